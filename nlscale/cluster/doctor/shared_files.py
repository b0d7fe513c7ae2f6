"""Whether all nodes see one folder: what a rank writes there, the others read."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nlscale.cluster.doctor.findings import Finding, Grade, merged, plural

WAIT_SECONDS = 10.0
"""How long a file may take to be seen: network file systems remember for seconds what was there."""
_POLL_SECONDS = 0.1
_CHECK = "shared folder"


def show(path: Path, token: str) -> None:
    """Write a file for others to see. Raises OSError."""
    with open(path, "w") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())


def look(path: Path, token: str, wait: float = WAIT_SECONDS) -> str | None:
    """Wait for a file that another host has written.

    Args:
        path: of the file.
        token: what it must hold.
        wait: seconds.

    Returns:
        None: it is there. Else what was seen instead.
    """
    end = time.monotonic() + wait
    while True:
        try:
            os.listdir(path.parent)  # makes a network file system ask its server
            seen = None if path.read_text() == token else "has other contents"
        except FileNotFoundError:
            seen = "is not there"
        except OSError as error:
            seen = error.strerror or str(error)
        if seen is None or time.monotonic() > end:
            return seen
        time.sleep(_POLL_SECONDS)


def judge(
    path: str,
    first: str,
    unseen_by: dict[str, str | None],
    unseen_from: dict[str, str | None],
) -> list[Finding]:
    """Name the hosts whose folder is another one.

    Args:
        path: the folder, as asked for.
        first: the host of the first rank.
        unseen_by: by other host, what it saw instead of the first host's file; None: it saw it.
        unseen_from: by other host, what the first host saw instead of its file.
    """
    findings = []
    advice = (
        f"checkpoints need a folder that all nodes share: mount one there (NFS, Lustre), and give "
        f"run.dir inside it, or --path if {path} is not where runs go"
    )
    for host, seen in unseen_by.items():
        back = unseen_from.get(host)
        if seen is not None:
            measured = f"does not see in {path} what {first} writes: the file {seen}"
        elif back is not None:
            measured = f"what it writes in {path} is not seen by {first}: the file {back}"
        else:
            continue
        findings.append(Finding(_CHECK, Grade.error, measured, advice, (host,)))
    if not findings:
        nodes = plural(1 + len(unseen_by), "node")
        return [Finding(_CHECK, Grade.ok, f"{path} is the same folder on {nodes}")]
    return merged(findings, [first, *unseen_by])
