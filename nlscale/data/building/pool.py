"""The processes of a pass: each does one unit at a time, and a lost one ends the build.

They are forked from a server that has imported what they need and has no threads. Each holds the
end of a pipe that nobody writes to: where the build is killed it is closed, and they end at once,
so that none of them writes into a folder that another build has taken over.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nlscale.data.building.duplicates import find_duplicates
from nlscale.data.building.survey import survey_unit
from nlscale.data.building.tokens import write_unit
from nlscale.data.building.work import DUPLICATES, SURVEY, TOKENS, Work
from nlscale.data.progress import Advance
from nlscale.errors import LostRank, UserError

_PASSES: dict[str, Callable[[Work, int, Advance], tuple[int, int]]] = {
    SURVEY: survey_unit,
    DUPLICATES: find_duplicates,
    TOKENS: write_unit,
}
"""By kind: makes a unit, and returns how much of it had been made before."""
_TELL_SECONDS = 0.2
_PRELOAD = ["nlscale.data.building.pool", "nlscale.data.writer"]


def run_pass(work: Work, kind: str, numbers: list[int], workers: int, advance: Advance) -> None:
    """Make units of a pass, in that many processes; in this one where one is enough.

    Args:
        work: what is being built.
        kind: of the pass.
        numbers: of the units, those that take longest first.
        workers: processes at most.
        advance: is told of the progress of all of them.

    Raises:
        UserError: of a unit.
        LostRank: a process was killed.
        OSError: the disk does not take what is written.
    """
    if min(workers, len(numbers)) > 1:
        with _workers(work, min(workers, len(numbers))) as team:
            _distribute(team, kind, numbers, advance, work)
        return
    for number in numbers:
        size, count = _PASSES[kind](work, number, advance)
        advance(size, count, kept=True)


class _Worker:
    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.pipe, theirs = context.Pipe()
        alive, self._mine = context.Pipe(duplex=False)
        arguments = (str(work.out), work.token, theirs, alive)
        self.process: Any = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        alive.close()
        self.number: int | None = None
        """Of the unit that it makes."""

    def give(self, kind: str, number: int) -> None:
        self.number = number
        self.pipe.send((kind, number))

    def end(self) -> None:
        self._mine.close()
        self.pipe.close()
        self.process.kill()
        self.process.join()


@contextmanager
def _workers(work: Work, count: int) -> Iterator[list[_Worker]]:
    team: list[_Worker] = []
    try:
        for number in range(1, count + 1):
            try:
                team.append(_Worker(work))
            except (OSError, EOFError) as error:  # the server that forks has ended, with EOFError
                why = str(error) or "there can be no more"
                raise UserError(
                    f"cannot start worker process {number} of {count}: {why}; "
                    "use fewer --workers, and the same command goes on from what is finished"
                ) from error
        yield team
    except BaseException:
        for worker in team:
            worker.end()
        work.tidy(mine=True)
        raise
    for worker in team:
        worker.end()


def _distribute(
    team: list[_Worker], kind: str, numbers: list[int], advance: Advance, work: Work
) -> None:
    waiting = deque(numbers)
    for worker in team:
        _give(worker, kind, waiting.popleft(), work)
    while busy := {worker.pipe: worker for worker in team if worker.number is not None}:
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]
            try:
                said, *values = worker.pipe.recv()
            except (EOFError, ConnectionError):
                raise _lost(worker, kind, work) from None
            if said == "error":
                raise values[0]
            advance(*values)
            if said == "done":
                worker.number = None
                if waiting:
                    _give(worker, kind, waiting.popleft(), work)


def _give(worker: _Worker, kind: str, number: int, work: Work) -> None:
    try:
        worker.give(kind, number)
    except ConnectionError:
        raise _lost(worker, kind, work) from None


def _lost(worker: _Worker, kind: str, work: Work) -> LostRank:
    worker.process.join()
    code = worker.process.exitcode
    how = f"ended with exit code {code}" if code >= 0 else f"was killed ({_name(-code)})"
    memory = ": is memory short? Use fewer --workers" if code == -signal.SIGKILL else ""
    assert worker.number is not None
    where = f"range {worker.number} of the hashes"
    if kind != DUPLICATES:
        unit = work.plan.units[worker.number]
        where = f"unit {unit.number} ({unit.files:,} files from {work.files(unit)[0].path} on)"
    return LostRank(
        f"worker process {worker.process.pid} {how} at the {kind} of {where}{memory}; "
        f"the same command goes on from what is finished"
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _serve(out: str, token: str, pipe: Connection, alive: Connection) -> None:
    """What a worker does, until the build has no more units or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the build itself ends its workers
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    import pyarrow

    # A core each: the processes are the parallelism.
    pyarrow.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work = Work(Path(out), token)
    while True:
        try:
            kind, number = pipe.recv()
        except EOFError:
            return
        tell = _Tell(pipe)
        try:
            size, count = _PASSES[kind](work, number, tell)
            tell.rest()
            pipe.send(("done", size, count, True))
        except BaseException as error:
            if not isinstance(error, (UserError, OSError, MemoryError)):
                error = RuntimeError("".join(traceback.format_exception(error)))
            pipe.send(("error", error))


def _end_with(alive: Connection) -> None:
    try:
        alive.recv()
    finally:
        os._exit(1)


class _Tell:
    """Tells the build of progress, some times a second."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._size = self._count = 0
        self._told = time.monotonic()

    def __call__(self, size: int, count: int = 1, kept: bool = False) -> None:
        self._size += size
        self._count += count
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            self.rest()

    def rest(self) -> None:
        self._pipe.send(("progress", self._size, self._count))
        self._size = self._count = 0
