"""Who owns a folder: of all processes of all hosts, one at a time writes a run, a sweep, or data.

The folder holds a chain of generations (`nlscale.cluster.life.generations`); the highest number
owns. No lock of the file system is used, and no clock of one host is compared with another's.

**Taking.** The highest generation n is judged. If it is free, a complete file is linked to n + 1. A
link is made once, on NFS too, whoever else tries at the same moment; where its answer was lost, two
links to the file say that it was made. Then the folder is listed again: if a higher number is
there, this one withdraws and judges that. Else the older ones are removed.

Killed anywhere, an owner or an heir leaves a chain whose highest file says who it was, and the next
one judges that. Of two that start at once, one makes the link and the other judges it. One that was
stopped between judging n and linking n + 1 finds that number taken, as the last file stays when its
owner lets go (`released`); or, where later owners have come and removed it, finds those when it
lists again.

**Judging.** Released: free. Of the same Slurm job and an earlier start of it: free, as Slurm starts
a job again when it has ended. Of this boot of this machine and these process numbers: alive if that
process is, which is decisive. Of anywhere else: watched. An owner touches its file every
`BEAT_SECONDS`; the watcher opens it anew for each look (NFS asks the server then) and believes that
it is dead once nothing has changed for `SILENT_SECONDS` of its own watching. A folder that was
copied with its owner file is told by the file's inode, and watched too.

**Losing.** An owner that was stopped for longer than that may have been succeeded. Its thread sees
it, and `Owned.check` does, before what is to be written: where nothing has been confirmed for a
while it looks for itself. Between that look and the write it may be stopped once more; what that
leaves is a record, or a checkpoint, which has its own name and checksums.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path

from nlscale.cluster.life.generations import HIDDEN, Chain, Owner, here, read, start_of
from nlscale.errors import TrainingFailed, UserError

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
"""Of watching without a sign of life, after which an owner on another host counts as dead."""
TRUST_SECONDS = 15.0
"""For which a confirmed ownership is believed without looking; far below `SILENT_SECONDS`."""
_POLL_SECONDS = 0.5
_MOST_VANISHINGS = 100


class Held(UserError):
    """Another process owns the folder."""


class LostOwnership(TrainingFailed):
    """The folder is another's: it was taken over, as this process gave no sign of life."""


class Owned:
    """A folder that this process owns, as long as the block of `hold` runs.

    Args:
        chain: of the folder.
        number: this process's generation in it.
        owner: what that says.
        made: the folders that were made for it, outermost first.
        tidy: leave no file of the chain behind.
    """

    def __init__(
        self, chain: Chain, number: int, owner: Owner, made: list[Path], tidy: bool
    ) -> None:
        self.number = number
        self.process = os.getpid()
        self.depth = 1
        """How many blocks hold it."""
        self._chain, self._owner, self._made, self._tidy = chain, owner, made, tidy
        self._lost: str | None = None
        self._missed: float | None = None
        """Since when its file is not there."""
        self._confirmed = _clock()
        self._over = threading.Event()
        self._looking = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether the folder is known to be another's."""
        return self._lost is not None

    def check(self) -> None:
        """To be called before anything is written there.

        Raises:
            LostOwnership: the folder is another's by now.
        """
        if self._lost is None and _clock() - self._confirmed > TRUST_SECONDS:
            self._confirm()
        if self._lost is not None:
            raise LostOwnership(self._lost)

    def release(self) -> None:
        """Let go of the folder; what fails is left to who judges this process, which ends."""
        self._over.set()
        self._confirm()
        if self._lost is not None:
            return
        with contextlib.suppress(OSError):
            alone = all(name.startswith(".owner-") for name in os.listdir(self._chain.folder))
            if not self._tidy and not (self._made and alone):
                self._chain.release(self.number, self._owner)
                return
            self._chain.remove(self.number)
            for folder in reversed(self._made if alone else []):
                folder.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS) and self._lost is None:
            self._confirm()

    def _confirm(self) -> None:
        """Give a sign of life, and see whether the folder is another's."""
        with self._looking:
            began = _clock()
            try:
                last = max(self._chain.numbers(), default=0)
                if last == self.number:
                    os.utime(self._chain.path(last))
                owner = read(self._chain.path(last))[0] if last else None
            except (FileNotFoundError, NotADirectoryError):
                owner, last = None, 0
            except OSError:
                return  # the file system fails, and has not said that the folder is another's
            mine = owner is None or replace(owner, inode=0) == self._owner
            if last == self.number and mine:
                self._confirmed, self._missed = began, None
            elif last >= self.number:
                heir = owner.who if owner else "another process"
                self._lost = (
                    f"{self._chain.folder} was taken over by {heir}: {self._owner.who} was stopped "
                    f"or cut off for {SILENT_SECONDS:g} s or more, and writes nothing more there"
                )
            elif self._missed is None:  # a listing may have lacked it for a moment
                self._missed = began
            elif began - self._missed >= BEAT_SECONDS:
                self._lost = (
                    f"{self._chain.path(self.number)}, which says who writes in that folder, was "
                    f"removed; nothing more is written there, and the same command goes on"
                )


_mine: dict[tuple[str, str], Owned] = {}
"""What this process holds; to hold it once more is the same."""


@contextmanager
def hold(
    folder: Path,
    what: str,
    instead: str = "another run.dir",
    name: str = "",
    waits: bool = False,
    say: Callable[[str], None] | None = None,
) -> Iterator[Owned]:
    """Own a folder while the block runs; it is made where it is missing.

    Args:
        folder: what the process is about to write.
        what: the process calls itself, such as `nlscale train`.
        instead: what to give instead of this folder, for the message.
        name: of one thing in the folder, where not all of the folder is to be owned. Its chain ends
            with it: an heir that sleeps for as long as another takes, uses and leaves the thing,
            and a third takes it, learns so from its thread alone.
        waits: until an owner that calls itself the same lets go, instead of refusing.
        say: takes a line on waiting; None: standard error.

    Raises:
        Held: another process owns it: who, since when, and what to do.
        UserError: it cannot be written; nothing is left behind.
    """
    key = str(Path(folder).resolve()), name
    owned = _mine.get(key)
    if owned is not None and owned.process == os.getpid() and not owned.lost:
        owned.depth += 1
    else:
        owned = _mine[key] = _take(Path(folder), what, instead, name, waits, say or _say)
    try:
        yield owned
    finally:
        owned.depth -= 1
        if not owned.depth:
            _mine.pop(key, None)
            owned.release()


def refuse_if_alive(folder: Path, instead: str = "another run.dir") -> None:
    """Refuse where it is certain, without waiting and writing, that another process owns a folder.

    Raises:
        Held: a process of this machine does.
    """
    chain = Chain(Path(folder))
    with contextlib.suppress(OSError):
        last = max(chain.numbers(), default=0)
        if last:
            owner, stat = read(chain.path(last))
            if owner is not None and _judge(owner, stat) is _State.alive:
                raise Held(_held(chain.folder, owner, instead))


def newest(folder: Path) -> int:
    """The number of a folder's highest generation; 0 where there is none."""
    try:
        return max(Chain(Path(folder)).numbers(), default=0)
    except OSError:
        return 0


class _State(Enum):
    free = 0
    alive = 1
    unknown = 2


def _take(
    folder: Path, what: str, instead: str, name: str, waits: bool, say: Callable[[str], None]
) -> Owned:
    chain, made, said = Chain(folder, name), list[Path](), set[str]()
    vanished = 0

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    try:
        while True:
            try:
                _make(folder, made)
                last, alive = _last(chain, once)
                if alive is not None and not (waits and alive.what == what):
                    raise Held(_held(folder, alive, instead))
                if alive is not None:
                    once(f"waiting until {folder} is free: {alive.who} holds it")
                    time.sleep(_POLL_SECONDS)
                elif (owner := _succeed(chain, last, what)) is not None:
                    return Owned(chain, last + 1, owner, made, bool(name))
                else:
                    time.sleep(_POLL_SECONDS / 10)  # a listing may be behind
            except FileNotFoundError:  # one that lets go removes what it has made for nothing
                vanished += 1
                if vanished > _MOST_VANISHINGS:
                    raise
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {folder}: {error.strerror or error}; mend that, or give {instead}"
            ) from None
        raise


def _last(chain: Chain, say: Callable[[str], None]) -> tuple[int, Owner | None]:
    """The highest generation, 0 where there is none, and who lives of it. Raises OSError."""
    last = max(chain.numbers(), default=0)
    return last, _living(chain.path(last), say) if last else None


def _succeed(chain: Chain, last: int, what: str) -> Owner | None:
    """Be the one after `last`, who is dead; None: another was faster. Raises OSError."""
    if max(chain.numbers(), default=0) != last:
        return None  # who was judged is not the last one any more
    owner = chain.create(last + 1, what)
    if owner is None:
        return None
    if max(chain.numbers(), default=0) > last + 1:
        chain.remove(last + 1)
        return None
    chain.remove_older(last + 1)
    return owner


def _living(path: Path, say: Callable[[str], None]) -> Owner | None:
    """Who lives of whom that file speaks; None: nobody, or it has gone. Raises OSError."""
    try:
        owner, stat = read(path)
        state = _judge(owner, stat)
        who = owner or _nobody(path, stat)
        if state is not _State.unknown:
            return who if state is _State.alive else None
        say(
            f"{path.parent} was left by {who.who}, which cannot be seen from here; waiting "
            f"{SILENT_SECONDS:g} s for a sign of life"
        )
        return who if _stirs(path, stat) else None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _stirs(path: Path, before: os.stat_result) -> bool:
    """Watch a file of another host: True as soon as its owner gives a sign of life."""
    until = _clock() + SILENT_SECONDS
    while _clock() < until:
        time.sleep(min(_POLL_SECONDS, SILENT_SECONDS / 10))
        owner, now = read(path)
        if owner is not None and owner.released:
            return False
        if _sign(now) != _sign(before):
            return True
    return False


def _judge(owner: Owner | None, stat: os.stat_result) -> _State:
    """Whether that owner lives, if it can be told at once."""
    if owner is None:
        return _State.unknown
    this = here("")
    same_job = bool(this.job) and (owner.job, owner.cluster) == (this.job, this.cluster)
    if owner.released or (same_job and owner.restarts < this.restarts):
        return _State.free
    if not (this.boot and this.pids) or (owner.boot, owner.pids) != (this.boot, this.pids):
        return _State.unknown
    if (owner.pid, owner.started) == (this.pid, this.started):
        return _State.free  # this process, which has let go of it
    started = start_of(owner.pid)
    if started is None or started not in (owner.started, HIDDEN):
        return _State.free
    certain = started == owner.started and stat.st_ino == owner.inode
    return _State.alive if certain else _State.unknown


def _nobody(path: Path, stat: os.stat_result) -> Owner:
    """Who to name where a file cannot be read."""
    what = f"who wrote {path.name} and did not end it"
    return Owner(what, "another host", "", "", 0, 0, "", "", 0, stat.st_mtime)


def _held(folder: Path, owner: Owner, instead: str) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    stop = f", stop it ({owner.stop})" if owner.pid else ""
    return (
        f"{folder} is held by {owner.who}, since {moment} ({_long(time.time() - owner.since)}): "
        f"wait for it{stop}, or give {instead}"
    )


def _long(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, noting those that were missing. Raises OSError."""
    missing = [folder]
    while not missing[-1].parent.exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for path in reversed(missing):
        try:
            path.mkdir()
            if path not in made:
                made.append(path)
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(
                    errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)
                ) from None


def _sign(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _clock() -> float:
    """Seconds that go on while the machine sleeps, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"nlscale: {line}", file=sys.stderr, flush=True)
