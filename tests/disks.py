"""Small drives of a test's own: a file system in a file, in a mount namespace that goes with it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
_NEW_NAMESPACE = 0x20000  # CLONE_NEWNS: of mounts
_OWN_FOLDER = 0x200  # CLONE_FS: what threads that share cannot enter another namespace
_SBIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


@dataclass(frozen=True)
class Disk:
    """A drive that is there for processes that have entered, and gone when the holder is."""

    holder: int
    """Pid of the process whose namespace has it."""
    folder: Path
    """Where it is mounted there."""

    def enter(self) -> None:
        """See it in this thread, and in the threads and processes that it starts, from now on."""
        here, library = Path.cwd(), ctypes.CDLL(None, use_errno=True)
        assert library.unshare(_OWN_FOLDER) == 0, os.strerror(ctypes.get_errno())
        with open(f"/proc/{self.holder}/ns/mnt") as namespace:
            entered = library.setns(namespace.fileno(), _NEW_NAMESPACE) == 0
        assert entered, os.strerror(ctypes.get_errno())
        os.chdir(here)

    @property
    def seen(self) -> Path:
        """The folder, for processes that have not entered."""
        return Path(f"/proc/{self.holder}/root{self.folder}")

    @property
    def filler(self) -> Path:
        """What fills it, likewise."""
        return self.seen / "filler"

    def fill(self, left: int = 0) -> None:
        """Take all that is free, to the last block, but for so many bytes."""
        file, at = os.open(self.filler, os.O_WRONLY | os.O_CREAT, 0o600), 0
        for size in (MIB, 4096):
            try:
                while True:
                    os.posix_fallocate(file, at, size)
                    at += size
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
        os.ftruncate(file, at - left)
        os.fsync(file)
        os.close(file)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Disk]:
    """An ext4 of that size in `folder`, through a loop device; what is killed leaves nothing."""
    assert os.geteuid() == 0, "a drive of the tests' own needs root, to mount it"
    for tool, package in (("mkfs.ext4", "e2fsprogs"), ("unshare", "util-linux")):
        assert shutil.which(tool, path=_SBIN), f"{tool} not found: apt-get install {package}"
    assert Path("/dev/loop-control").exists(), "no loop devices here: modprobe loop"
    image, point = folder / "disk.ext4", folder / "disk"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(mebibytes * MIB)
    environment = {**os.environ, "PATH": _SBIN}
    # all is for who asks: root keeps nothing for itself
    make = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", str(image)]
    subprocess.run(make, check=True, env=environment)
    hold = 'mount -o loop "$1" "$2" && echo mounted && exec cat'  # until its input ends
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", hold, "sh"]
    with subprocess.Popen(
        [*command, str(image), str(point)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        said = holder.stdout.readline()
        assert said == "mounted\n", f"mount -o loop: {said}"
        image.unlink()
        yield Disk(holder.pid, point)
