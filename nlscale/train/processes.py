"""A run in processes of its own on this machine, started from Python and waited for.

Each rank is an operating system process in a session of its own, so that Ctrl-C reaches the caller
alone, which hands it on once. Under torchrun all exit codes become 1, so torchrun is not used: the
ranks get the environment that it would give them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from nlscale.config import recipe as recipes
from nlscale.errors import GaveUp, LostRank, Stopped, TrainingFailed, UserError
from nlscale.train.folder import Run, read

_ERRORS = {e.exit_code: e for e in (UserError, TrainingFailed, GaveUp, LostRank, Stopped)}
_OF_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    "TORCHELASTIC_USE_AGENT_STORE",
)
_POLL_SECONDS = 0.05
_OTHERS_SECONDS = 90.0
"""For which the others may go on when a rank has failed: those that have met it end before."""


def start(recipe: str | Path, overrides: Sequence[str], ranks: int, imports: Sequence[str]) -> Run:
    """See `nlscale.start`."""
    if ranks < 1:
        raise UserError(f"ranks={ranks}; a run has 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "nlscale.start makes ranks of its own, and this process is one of several already "
            "(WORLD_SIZE); call it without torchrun"
        )
    modules = [f"run.imports=[{','.join(imports)}]"] if imports else []
    config = recipes.load(recipe, [*overrides, *modules], trusted=True).config
    named = [f"--import={module}" for module in imports]
    with tempfile.TemporaryDirectory(prefix="nlscale-") as folder:
        reasons = [Path(folder) / str(rank) for rank in range(ranks)]
        program = [sys.executable, "-m", "nlscale.train.child"]
        asked = ["train", str(recipe), *overrides, *named]
        processes = [
            subprocess.Popen(
                [*program, str(reason), *asked],
                env=environment,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            for reason, environment in zip(reasons, _environments(ranks), strict=True)
        ]
        try:
            ended = _wait(processes)
        finally:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()  # one that still runs stops then, with a checkpoint
            for process in processes:
                process.wait()
        _raise(ended, reasons)
    return read(config.run.dir)


def _environments(ranks: int) -> list[dict[str, str]]:
    """Of each rank, as torchrun makes it; of a single one as without torchrun."""
    own = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    if ranks == 1:
        return [own]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    world = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shared = {"OMP_NUM_THREADS": threads} | own | world
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes by rank, in the order in which they ended.

    Raises:
        KeyboardInterrupt: one came, and all have ended.
    """
    ended: dict[int, int] = {}
    interrupted = False
    others_until = float("inf")
    while len(ended) < len(processes):
        try:
            for rank, process in enumerate(processes):
                code = process.poll()
                if code is not None and rank not in ended:
                    ended[rank] = code
                    if code not in (0, Stopped.exit_code):
                        others_until = min(others_until, time.monotonic() + _OTHERS_SECONDS)
            if time.monotonic() > others_until:
                for process in processes:
                    process.kill()
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
            for process in processes:
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return ended


def _raise(ended: dict[int, int], reasons: list[Path]) -> None:
    """Raise what the first rank that failed and knows why has said, if any failed."""
    failed = [rank for rank, code in ended.items() if code]
    if not failed:
        return
    rank = next((rank for rank in failed if reasons[rank].exists()), failed[0])
    code = ended[rank]
    if reasons[rank].exists():
        raise _ERRORS.get(code, TrainingFailed)(reasons[rank].read_text(encoding="utf-8"))
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        raise LostRank(f"rank {rank} was killed by {name}{hint}")
    raise _ERRORS.get(code, TrainingFailed)(
        f"rank {rank} ended with exit code {code}; its output says why"
    )
