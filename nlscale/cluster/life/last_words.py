"""Why a process of ours ended, from what it printed last."""

from __future__ import annotations

import signal
from pathlib import Path

_LOG_TAIL_BYTES = 1 << 16


def last_words(log: Path, code: int, start: int = 0) -> str:
    """In one line: what it said last, or the signal that ended it.

    Args:
        log: of all that it printed.
        code: its exit code; minus the signal that killed it.
        start: size of the log when it began.
    """
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    try:
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    ours = [i for i, line in enumerate(lines) if line.startswith("nlscale: ")]
    said = lines[ours[-1] :] if ours else [line for line in lines if line.strip()][-1:]
    text = " ".join(" ".join(said).removeprefix("nlscale: ").split())
    return text or f"exit code {code}, and it said nothing"
