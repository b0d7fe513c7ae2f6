"""The files that say who owns a folder, `.owner-00000007`, and every change made to them.

What they mean, and why no two processes take each other's for theirs, is told in
`nlscale.cluster.life.owner`. A file is one line of JSON. It is written under another name, synced,
and then linked to its number, so that it is there whole or not at all; on a file system without
hard links it is created exclusively, and may have been cut short.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MOST_BYTES = 1 << 16
_FAR = 1e11
"""Unix time that no owner has begun at."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "float": (int, float),
    "bool": (bool,),
}
HIDDEN = -1
"""The start of a process that is there and that this one may not look at."""


def _nothing(operation: str) -> None:
    pass


on_operation: Callable[[str], None] = _nothing
"""For tests: called after each change on the disk with its name, such as `link`."""


@dataclass(frozen=True)
class Owner:
    """Who a generation is, as its file says."""

    what: str
    host: str
    boot: str
    """Of the machine's boot, empty where it is not known."""
    pids: str
    """The namespace of process numbers."""
    pid: int
    started: int
    """Of the process, in ticks since the boot."""
    job: str
    """Number of the Slurm job, empty where there is none."""
    cluster: str
    """Of Slurm, which counts jobs."""
    restarts: int
    """Of the Slurm job."""
    since: float
    """Unix time, of its host."""
    inode: int = 0
    """Of the file itself; a copy of the folder has another."""
    released: bool = False

    @property
    def who(self) -> str:
        """In words."""
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"{self.what}, process {self.pid} on {self.host}{job}"

    @property
    def stop(self) -> str:
        """The command that stops it."""
        return f"scancel {self.job}" if self.job else f"kill {self.pid} on {self.host}"


class Chain:
    """The generations of one folder, or of one thing in it.

    Args:
        folder: where they are.
        name: of the thing, empty for the folder itself.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = folder
        self._prefix = f".owner-{name}-" if name else ".owner-"
        self._number = re.compile(re.escape(self._prefix) + r"(\d{8,})")

    def path(self, number: int) -> Path:
        """Of a generation."""
        return self.folder / f"{self._prefix}{number:08d}"

    def numbers(self) -> set[int]:
        """Those that there are. Raises OSError."""
        found = (self._number.fullmatch(entry) for entry in os.listdir(self.folder))
        return {int(match[1]) for match in found if match}

    def create(self, number: int, what: str) -> Owner | None:
        """Make that generation this process's; None: another was faster. Raises OSError."""
        owner = here(what)
        partial = self._write(owner)
        try:
            os.link(partial, self.path(number))
        except OSError as error:
            # a link whose answer was lost is there all the same
            links = partial.stat().st_nlink if partial.exists() else 0
            if links != 2:
                if not links or error.errno == errno.EEXIST:
                    return None  # or taken away by one that has become the owner
                if error.errno in _NO_LINKS:
                    return _create_exclusively(self.path(number), owner)
                raise
        finally:
            on_operation("link")
            partial.unlink(missing_ok=True)
            on_operation("unlink")
        return owner

    def release(self, number: int, owner: Owner) -> None:
        """Say that its owner has let go of the folder. Raises OSError."""
        os.replace(self._write(replace(owner, released=True)), self.path(number))
        on_operation("release")

    def remove(self, number: int) -> None:
        """Remove a generation. Raises OSError."""
        self.path(number).unlink(missing_ok=True)
        on_operation("remove")

    def remove_older(self, number: int) -> None:
        """Those before, and what heirs that were killed, or come too late, have written."""
        with contextlib.suppress(OSError):
            for older in self.numbers():
                if older < number:
                    self.remove(older)
            for path in self.folder.iterdir():
                if path.name.startswith(f"{self._prefix}~"):
                    path.unlink(missing_ok=True)
                    on_operation("remove")

    def _write(self, owner: Owner) -> Path:
        """A whole file on the disk, under a name that no other process gives."""
        end = f"~{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        path = self.folder / f"{self._prefix}{end}"
        _write_new(path, owner)
        return path


def read(path: Path) -> tuple[Owner | None, os.stat_result]:
    """Who the file says, None where that cannot be read; opened anew each time. Raises OSError."""
    with open(path, "rb") as file:
        data, stat = file.read(_MOST_BYTES), os.fstat(file.fileno())
    return _parse(data), stat


def here(what: str) -> Owner:
    """This process."""
    environment = os.environ.get
    restarts = environment("SLURM_RESTART_COUNT", "")
    boot = pids = ""
    with contextlib.suppress(OSError):
        pids = os.readlink("/proc/self/ns/pid")
        boot = _BOOT.read_text().strip()
    return Owner(
        what=what,
        host=socket.gethostname(),
        boot=boot,
        pids=pids,
        pid=os.getpid(),
        started=start_of(os.getpid()) or 0,
        job=environment("SLURM_JOB_ID", ""),
        cluster=environment("SLURM_CLUSTER_NAME", ""),
        restarts=int(restarts) if restarts.isdecimal() else 0,
        since=time.time(),
    )


def start_of(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None: there is none, or a dead one that is
    not buried; `HIDDEN`: there is one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = text[text.rindex(")") + 1 :].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (FileNotFoundError, ProcessLookupError):
        pass
    except (OSError, ValueError, IndexError):
        return HIDDEN
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        return HIDDEN  # of another user, where /proc shows one's own alone
    return HIDDEN


def _create_exclusively(path: Path, owner: Owner) -> Owner | None:
    try:
        _write_new(path, owner)
    except FileExistsError:
        return None
    return owner


def _write_new(path: Path, owner: Owner) -> None:
    """Raises OSError: nothing is left behind, unless such a file was there."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        on_operation("create")
        text = json.dumps(asdict(replace(owner, inode=os.fstat(file).st_ino))) + "\n"
        left = text.encode()
        while left:
            left = left[os.write(file, left) :]
        on_operation("write")
        os.fsync(file)
        on_operation("sync")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def _parse(data: bytes) -> Owner | None:
    try:
        said: Any = json.loads(data)
        owner = Owner(**said)
    except (ValueError, TypeError, RecursionError):
        return None
    fields = Owner.__dataclass_fields__.values()
    right = all(isinstance(getattr(owner, f.name), _KINDS[str(f.type)]) for f in fields)
    return owner if right and owner.pid > 0 and 0 <= owner.since < _FAR else None
