"""The disk under the checkpoints: room, speed, and renames on which saving stands."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nlscale.cluster.doctor.findings import Finding, Grade, far_below, merged, plural, span
from nlscale.config.units import human_bytes
from nlscale.config.vocabulary import OptimizerConfig
from nlscale.optim.table import rule
from nlscale.telemetry.terminal import duration

PREFIX = ".nlscale-doctor-"
"""Begins the name of every folder that is made for a test, and removed after it."""

_LARGEST = 256_000_000  # bytes
_SHARE = 8  # the test takes at most this part of the free space
_FIRST = 4_000_000  # bytes; twice as many follow as long as there is time
_SECONDS = 3.0  # of writing, and of reading
_SMALLEST = 1_000_000  # bytes; less says nothing of the speed

_FULL = 1e9  # bytes; not even a small run fits
_LITTLE = 20e9
_INODES_LITTLE = 10_000
_SLOW = 100e6  # bytes a second
_RULE = OptimizerConfig().rule  # no recipe is known here
_BYTES_A_PARAMETER = 4 + rule(_RULE).state_bytes  # fp32 weights, and moments
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Disk:
    """What one host measured of the folder."""

    path: str
    """In full."""
    kind: str
    """File system, such as ext4, nfs4 or tmpfs."""
    total: int
    """Bytes."""
    free: int
    """Bytes that this user may still write."""
    free_inodes: int | None
    """Files that may still be made; None: it does not count them."""
    tested: int
    """Bytes written and read; 0: the speed was not measured."""
    write: float | None
    """Bytes a second, until they were on the disk."""
    read: float | None
    """Bytes a second, not from memory where the system allows to drop it."""
    trouble: str | None
    """What the system said when it could not be written."""
    rename: str | None
    """Why renaming a file over another and a folder is not as it must be; None: it is."""


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """The folder and those above it, for as long as it takes: what was made goes afterwards.

    Raises:
        OSError: it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # no longer empty: somebody uses it
                folder.rmdir()


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder in there, which goes whenever the process is interrupted.

    tempfile's stays where that happens between its making and its being known.
    """
    scratch = path / f"{PREFIX}{secrets.token_hex(8)}"
    try:
        scratch.mkdir(mode=0o700)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def probe(path: Path) -> Disk:
    """Measure in a folder that is there; leaves nothing behind.

    A test file has no name while it is written, so that it goes even if the process is killed.
    """
    found = os.statvfs(path)
    free = found.f_bavail * found.f_frsize
    size = min(_LARGEST, free // _SHARE)
    write = read = trouble = rename = None
    tested = 0
    try:
        with scratch_folder(path) as scratch:
            rename = _try_renames(scratch)
            if size >= _SMALLEST:
                tested, write, read = _measure(scratch, size)
            else:
                (scratch / "small").write_bytes(bytes(4096))
    except OSError as error:
        trouble = error.strerror or str(error)
    return Disk(
        path=str(path.resolve()),
        kind=file_system(path),
        total=found.f_blocks * found.f_frsize,
        free=free,
        free_inodes=found.f_favail if found.f_files else None,
        tested=tested,
        write=write,
        read=read,
        trouble=trouble,
        rename=rename,
    )


def file_system(path: Path) -> str:
    """The kind of file system that a path is on, as the kernel names it."""
    real = path.resolve()
    longest, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mounted = Path(before.split()[4].encode().decode("unicode_escape"))
        # of several mounts on one folder the last is seen
        if real.is_relative_to(mounted) and len(mounted.parts) >= longest:
            longest, kind = len(mounted.parts), after.split()[0]
    return kind


def judge(found: dict[str, Disk]) -> list[Finding]:
    """Room, kind, speed and renames, by host."""
    findings = []
    for host, disk in found.items():
        findings += _room(host, disk)
        if disk.rename is not None:
            findings.append(
                Finding(
                    "renames",
                    Grade.error,
                    f"{disk.path} ({disk.kind}): {disk.rename}",
                    "a checkpoint is renamed into place when all of it is written; use a POSIX "
                    "file system",
                    (host,),
                )
            )
    return merged(findings, found) + _speeds(found)


def cannot_write(path: Path, error: OSError, host: str) -> Finding:
    """The finding of a folder that could not even be made."""
    return _refused(str(path.absolute()), error.strerror or str(error), host)


def _refused(path: str, trouble: str, host: str) -> Finding:
    advice = "give its user the right to, or choose another folder for run.dir and --path"
    return Finding("disk", Grade.error, f"cannot write to {path}: {trouble}", advice, (host,))


def _room(host: str, disk: Disk) -> list[Finding]:
    check, on = "disk", (host,)
    where = f"{disk.path} ({disk.kind})"
    measured = f"{where}: {human_bytes(disk.free)} of {human_bytes(disk.total)} free"
    more = (
        f"a checkpoint takes {_BYTES_A_PARAMETER} bytes a parameter and more under {_RULE} "
        f"(`nlscale plan` says how much), and checkpoint.keep of them are kept: free some, or use "
        f"a larger disk"
    )
    if disk.free < _FULL:
        return [Finding(check, Grade.error, measured, more, on)]
    if disk.free_inodes is not None and disk.free_inodes < _INODES_LITTLE:
        measured = f"{where}: only {plural(disk.free_inodes, 'file')} can still be made (inodes)"
        grade = Grade.error if disk.free_inodes < 100 else Grade.warning
        return [Finding(check, grade, measured, "remove small files; df -i shows it", on)]
    if disk.trouble is not None:
        return [_refused(disk.path, disk.trouble, host)]
    if disk.kind in _IN_MEMORY:
        advice = "what is there is gone when the machine restarts; put run.dir on a disk"
        return [Finding(check, Grade.warning, f"{measured}, in memory", advice, on)]
    if disk.kind == "overlay":
        measured = f"{measured}, the container's own layer"
        advice = "what is there is gone with the container; mount a folder of the host for run.dir"
        return [Finding(check, Grade.warning, measured, advice, on)]
    if disk.free < _LITTLE:
        return [Finding(check, Grade.warning, measured, more, on)]
    return [Finding(check, Grade.ok, measured, hosts=on)]


def _speeds(found: dict[str, Disk]) -> list[Finding]:
    check = "disk speed"
    writes = {host: disk.write for host, disk in found.items() if disk.write is not None}
    reads = {host: disk.read for host, disk in found.items() if disk.read is not None}
    if not writes:
        return []
    slow = [host for host in writes if min(writes[host], reads[host]) < _SLOW]
    behind = [host for host in far_below(writes) if host not in slow]
    fine = [host for host in writes if host not in slow and host not in behind]

    def finding(grade: Grade, hosts: list[str], advice: str = "") -> Finding:
        measured = (
            f"writes {span((writes[h] for h in hosts), _rate)}, "
            f"reads {span((reads[h] for h in hosts), _rate)}"
        )
        size = human_bytes(max(found[host].tested for host in hosts))
        at_once = f", {len(writes)} nodes at once" if len(writes) > 1 else ""
        on = () if len(hosts) == len(found) else tuple(hosts)
        return Finding(check, grade, f"{measured} ({size}{at_once})", advice, on)

    findings = []
    if fine:
        findings.append(finding(Grade.ok, fine))
    if slow:
        slowest = min(min(writes[host], reads[host]) for host in slow)
        advice = (
            f"a billion parameters take {duration(_BYTES_A_PARAMETER * 1e9 / slowest)} to save or "
            f"to load: use a faster disk, or save less often (checkpoint.every)"
        )
        findings.append(finding(Grade.warning, slow, advice))
    if behind:
        usual = _rate(statistics.median(writes.values()))
        advice = f"{usual} is usual here, and a save waits for the slowest: see its disk"
        findings.append(finding(Grade.warning, behind, advice))
    return findings


def _rate(speed: float) -> str:
    return f"{human_bytes(float(f'{speed:.2g}'))}/s"


def _measure(scratch: Path, size: int) -> tuple[int, float, float]:
    """Write and read a file of at most `size` bytes: the bytes, and bytes a second of each."""
    block = os.urandom(_SMALLEST)  # what compresses would be written faster than a checkpoint
    name = scratch / "speed"
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        name.unlink()
        written, part, spent = 0, _FIRST, [0.0]
        while written < size and sum(spent) + 2 * spent[-1] < _SECONDS:
            started = time.monotonic()
            written += _write(file, block, min(part, size - written))
            spent.append(time.monotonic() - started)
            part *= 2
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = memoryview(bytearray(_SMALLEST))
        started, done, reading = time.monotonic(), 0, 0.0
        while done < written and reading < _SECONDS:
            count = os.preadv(file, [buffer[: written - done]], done)
            if not count:
                raise OSError(f"of {written:,} bytes written only {done:,} can be read back")
            done += count
            reading = time.monotonic() - started
    finally:
        os.close(file)
    return written, written / sum(spent), done / reading


def _write(file: int, block: bytes, size: int) -> int:
    done = 0
    while done < size:
        done += os.write(file, memoryview(block)[: size - done])
    os.fsync(file)
    return done


def _try_renames(scratch: Path) -> str | None:
    """Rename a file over another, and a folder, as saving a checkpoint does; what went wrong."""
    old, new, folder = scratch / "old", scratch / "new", scratch / "folder.partial"
    old.write_text("old")
    new.write_text("new")
    folder.mkdir()
    (folder / "inside").write_text("inside")
    try:
        os.replace(new, old)
        os.replace(folder, scratch / "folder")
    except OSError as error:
        return f"renaming fails: {error.strerror}"
    if old.read_text() != "new" or new.exists() or not (scratch / "folder" / "inside").exists():
        return "a renamed file or folder is not the new one"
    return None
