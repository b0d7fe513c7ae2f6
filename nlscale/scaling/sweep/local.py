"""Running a sweep on this machine: a few runs at a time, each in a process of its own, or in some.

The processes are forked from one that has imported torch and nlscale but never computed nor touched
a GPU, so that a run is under way in a second. Each writes to its own log, in a session of its own:
Ctrl-C reaches the sweep alone, which tells them; and when the sweep dies they stop like a run that
was told to, with a checkpoint.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from nlscale.cluster.life.exits import exit_with
from nlscale.cluster.life.last_words import last_words
from nlscale.cluster.life.owner import Owned, hold
from nlscale.cluster.life.place import VARIABLES
from nlscale.cluster.life.signals import handled, with_hangup
from nlscale.config import recipe
from nlscale.errors import Stopped, UserError
from nlscale.scaling.sweep.board import Board
from nlscale.scaling.sweep.ranks import ranks_of
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.status import Status, checkpoint_at, status
from nlscale.train.folder import WRITER

LOG_FILE = "output.log"
RECIPE_FILE = "recipe.yaml"
_POLL_SECONDS = 0.2


@dataclass
class _Job:
    """A run under way."""

    run: Run
    process: Any
    place: dict[str, str]
    """Its worker's environment."""
    log_start: int
    """Size of its log when it began."""
    started: float


def worker_places(workers: int | None, ranks: int) -> list[dict[str, str]]:
    """The environment of each worker: a GPU a rank, where there are any, and its share of cores.

    Args:
        workers: how many; None: as many as there are GPUs, or else cores, for their ranks.
        ranks: of each run.
    """
    import torch

    gpus = torch.cuda.device_count()  # asks the driver; no context is made
    cores = len(os.sched_getaffinity(0))
    workers = workers or max(1, (gpus or cores) // ranks)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // (workers * ranks))))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    places = []
    for worker in range(workers):
        place = {"OMP_NUM_THREADS": threads}
        if gpus:
            own = [names[(worker * ranks + rank) % gpus] for rank in range(ranks)]
            place["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        places.append(place)
    return places


@contextmanager
def only_sweep(folder: Path) -> Iterator[Owned]:
    """Hold the folder of a sweep while it is being run; see `nlscale.cluster.life.owner`.

    Raises:
        Held: another one holds it.
        UserError: it cannot be written.
    """
    with hold(folder, "nlscale sweep", instead="the sweep another dir") as owned:
        yield owned


def run_local(
    runs: list[Run],
    states: Mapping[str, Status],
    places: list[dict[str, str]],
    ranks: int,
    board: Board,
    owned: Owned,
) -> dict[str, str]:
    """Run what has not finished; returns why, of those that failed, by name.

    Each run has so many ranks. A run begins when the one that it begins from has the checkpoint
    for it; what takes longest is begun first.

    Raises:
        Stopped: a signal came; what was under way has saved.
        LostOwnership: another sweep has taken the folder over; likewise.
    """
    return _Executor(runs, states, places, ranks, board, owned).run()


def in_order(runs: list[Run]) -> list[Run]:
    """Runs as they are to begin: those of the longest chains first, so that none is left
    alone at the end.

    Chains that take more than half of the longest, more than a quarter, ... keep the order of the
    file among themselves: what a sweep that is stopped has done by then is what was asked first.
    """
    chains: dict[str, float] = {}
    for run in runs:
        chains[run.chain] = chains.get(run.chain, 0.0) + run.flops
    longest = max(chains.values(), default=0.0)
    return sorted(runs, key=lambda run: math.floor(math.log2(longest / chains[run.chain])))


class _Executor:
    def __init__(
        self,
        runs: list[Run],
        states: Mapping[str, Status],
        places: list[dict[str, str]],
        ranks: int,
        board: Board,
        owned: Owned,
    ) -> None:
        self._states, self._board, self._free = states, board, places
        self._ranks, self._owned = ranks, owned
        self._waiting = [run for run in in_order(runs) if not states[run.name].finished]
        self._running: dict[int, _Job] = {}
        self._failed: dict[str, str] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["nlscale.train.preload"])

    def run(self) -> dict[str, str]:
        with _stop_signals() as came:
            try:
                self._loop(came)
            finally:
                for job in self._running.values():  # after an error, or a second Ctrl-C
                    job.process.kill()
                    job.process.join()
        for run in self._waiting:  # none of them could begin
            assert run.start is not None
            self._failed[run.name] = (
                f"not begun: {run.start.name}, from which it begins, did not get to step "
                f"{run.start_step:,}"
            )
        return self._failed

    def _loop(self, came: list[str]) -> None:
        told = False
        while True:
            if self._owned.lost and not came:
                came.append("taken over by another sweep")
            if came and not told:
                told = True
                self._board.line(f"{came[0]}: waiting for {len(self._running)} runs to save")
                for job in self._running.values():
                    job.process.terminate()
            while self._free and not told and (run := self._next()) is not None:
                self._start(run)
            if not self._running:
                break
            self._board.show({job.run.name for job in self._running.values()})
            for sentinel in wait(list(self._running), _POLL_SECONDS):
                assert isinstance(sentinel, int)
                self._end(self._running.pop(sentinel), told)
        self._owned.check()
        finished = sum(state.finished for state in self._states.values())
        if told and finished + len(self._failed) < len(self._states):
            raise Stopped(
                f"stopped ({came[0]}): {finished} of {len(self._states)} runs have finished; "
                f"the same command goes on"
            )

    def _next(self) -> Run | None:
        under_way = {job.run.name for job in self._running.values()}
        waiting = {run.name for run in self._waiting}
        for run in self._waiting:
            start = run.start
            if start is None or checkpoint_at(start, run.start_step).exists():
                return run
            if start.name not in under_way | waiting | self._failed.keys():
                return run  # finished without it: the run says so itself
        return None

    def _start(self, run: Run) -> None:
        self._waiting.remove(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        recipe.write(run.config, run.folder / RECIPE_FILE, imports=True)
        log = run.folder / LOG_FILE
        place = self._free.pop(0)
        log_start = log.stat().st_size if log.exists() else 0
        process = self._context.Process(
            target=_train, args=(run.folder / RECIPE_FILE, log, place, self._ranks), name=run.name
        )
        process.start()
        assert process.sentinel is not None
        self._running[process.sentinel] = _Job(run, process, place, log_start, time.monotonic())

    def _end(self, job: _Job, told: bool) -> None:
        job.process.join()
        code = job.process.exitcode
        self._free.append(job.place)
        seconds = time.monotonic() - job.started
        if told and code in (Stopped.exit_code, -signal.SIGTERM):
            return
        try:
            state = status(job.run) if code == 0 else None
            reason = "it ended well, and has no summary"
        except UserError as error:
            state, reason = None, str(error)
        if state is not None and state.finished:
            self._board.finished(job.run, state, seconds)
            return
        if code:
            reason = last_words(job.run.folder / LOG_FILE, code, job.log_start)
        self._failed[job.run.name] = reason
        self._board.failed(job.run, reason)


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Notes the names of signals that ask to stop; a second Ctrl-C ends the sweep at once."""
    came: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        if number == signal.SIGINT and len(came) > 1:
            raise KeyboardInterrupt

    with handled(with_hangup((signal.SIGINT, signal.SIGTERM)), note):
        yield came


def _train(recipe_file: Path, log: Path, environment: dict[str, str], ranks: int) -> None:
    """The life of a run, in a process of its own, which forks its ranks where it has several."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in VARIABLES:  # the sweep is one process
        os.environ.pop(name, None)
    os.environ.update(environment)
    exit_with(lambda: _as_ranks(recipe_file, ranks))


def _as_ranks(recipe_file: Path, ranks: int) -> int:
    # The process that had this run in a sweep that was killed may still be saving: wait for it.
    if ranks == 1:
        with hold(recipe_file.parent, "nlscale train, in a sweep", waits=True):
            return _start_rank(recipe_file)
    with hold(recipe_file.parent, WRITER, waits=True):
        pass  # the first of the ranks takes it
    return ranks_of(ranks, lambda: exit_with(lambda: _start_rank(recipe_file)))


def _start_rank(recipe_file: Path) -> int:
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    import torch

    from nlscale.train.start import start

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return start(recipe_file, [])


def _stop_with_the_sweep() -> None:
    sweep = multiprocessing.parent_process()
    assert sweep is not None
    sweep.join()
    os.kill(os.getpid(), signal.SIGTERM)
