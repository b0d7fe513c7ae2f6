"""When a run saves, and how it goes on meanwhile.

The state is copied to host memory, which is all that training waits for; a thread writes the copy,
over a process group of its own. At most one save is under way: the next one waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nlscale.checkpoint import FOLDER
from nlscale.checkpoint.mirror.copier import Copier
from nlscale.checkpoint.slabs import HostSlabs
from nlscale.checkpoint.state import copy_of_state, trainer_state
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint, Store, Written
from nlscale.cluster.life.owner import LostOwnership
from nlscale.cluster.life.watch import doing
from nlscale.config.vocabulary import CheckpointConfig, RunConfig
from nlscale.errors import TrainingFailed, UserError
from nlscale.plan.checks import checkpoint_interval
from nlscale.step.trainer import Counters, Trainer

_SLOW_DISK = 1e8
"""Bytes a second that a rank writes at least, of a file system that all use at once **[choice]**;
what counts until the first save has been measured."""


class Saver:
    """Saves a trainer's state as configured. The same calls on every rank.

    A context manager: leaving it waits for the save under way, also when the run has failed.

    Args:
        trainer: whose state it is.
        data: what identifies the data.
        wandb_id: the id under which the run is tracked, if it is.
        store: where to.
        say: takes a line on each finished save; called on the first rank, from the thread.
        check: called before anything is written; raises where this process may not, any more.
        copier: takes what is written, on the first rank; None: nothing is copied.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: dict[str, Any],
        wandb_id: str | None,
        store: Store,
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
        copier: Copier | None = None,
    ) -> None:
        self._trainer, self._data, self._wandb_id = trainer, data, wandb_id
        self._store, self._say, self._check = store, say, check
        self._copier = copier
        self._config = trainer.config.checkpoint
        self._every = checkpoint_interval(trainer.config.checkpoint)
        self._saved_at = time.monotonic()
        self._slabs = HostSlabs(trainer.layout.device)
        self._seconds: float | None = None
        self._expected: float | None = None
        self._began = 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._stalled = 0.0
        self.written: Written | None = None
        """What the last finished save wrote."""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()

    def wants(self, counters: Counters, tokens_per_step: int) -> bool:
        """Whether the step about to be taken should be followed by a save.

        The first rank asks for all: clocks differ.
        """
        if not self._trainer.layout.is_writer:
            return False
        if counters.step + 1 in self._config.steps:
            return True
        if self._every is None:
            return False
        count, unit = self._every.count, self._every.unit
        if unit == "minutes":
            return time.monotonic() - self._saved_at >= 60 * count
        if unit == "steps":
            return (counters.step + 1) % count == 0
        return (counters.tokens + tokens_per_step) // count > counters.tokens // count

    @property
    def seconds(self) -> float:
        """From asking for a save to the end of all that follows from it, the last time.

        Of the one under way, if that has taken longer already; before the first, what is expected.
        """
        if self._expected is None:  # once: it looks at all of the state, which may lie on a drive
            self._expected = _expected(self._trainer)
        seconds = self._seconds if self._seconds is not None else self._expected
        under_way = self._thread is not None and self._thread.is_alive()
        return max(seconds, time.monotonic() - self._began if under_way else 0.0)

    def take_stalled(self) -> float:
        """Seconds that training has waited for saves since the last call."""
        stalled, self._stalled = self._stalled, 0.0
        return stalled

    @property
    def failed(self) -> bool:
        """Whether a save could not be written."""
        return self._error is not None

    def save(self) -> None:
        """Copy the state and write it in the background; waits for the save before.

        Raises:
            TrainingFailed: the save before could not be written.
        """
        started = time.monotonic()
        self.finish()
        self._began = time.monotonic()
        self._check()
        with doing("copying the state for a checkpoint", checkpoint=True):
            pieces = copy_of_state(self._trainer, self._slabs)
            state = trainer_state(self._trainer, self._data, self._wandb_id)
        stall = time.monotonic() - started
        self._stalled += stall
        self._saved_at = time.monotonic()
        self._thread = threading.Thread(
            target=self._write, args=(self._trainer.counters.step, pieces, state, stall)
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            TrainingFailed: it could not be written.
        """
        if self._thread is not None:
            with doing("waiting for the checkpoint to be written", checkpoint=True):
                self._thread.join()
            self._thread = None
        if self._error is not None:
            raise TrainingFailed(
                f"{self._error}; the checkpoints before it are whole: mend that and start again"
            ) from self._error

    def give_up(self) -> NoReturn:
        """End the run, on every rank, because a save failed on some.

        Raises:
            TrainingFailed: always.
        """
        self.finish()
        error = TrainingFailed("another rank could not write its part of a checkpoint")
        error.echo = True  # that rank says why
        raise error

    def _write(self, step: int, pieces: list[Piece], state: dict[str, Any], stall: float) -> None:
        try:
            layout = self._trainer.layout
            with doing("writing a checkpoint", checkpoint=True):
                written = self._store.write(step, pieces, state, layout.host)
            self.written = written
            if layout.is_writer:
                if self._copier is not None:
                    self._copier.offer(Checkpoint(written.path, step))
                self._prune(step)
                self._say(
                    f"checkpoint at step {step}: {written.bytes / 1e6:.1f} MB in "
                    f"{written.seconds:.1f} s, training waited {1e3 * stall:.0f} ms"
                )
            self._seconds = time.monotonic() - self._began
        except Exception as error:  # shown by the training thread, on all ranks at one step
            self._error = error

    def _prune(self, step: int) -> None:
        try:
            self._check()
            spare = self._copier.copying if self._copier is not None else None
            self._store.prune(self._config.keep, self._config.keep_every, step, spare)
        except LostOwnership:
            return  # training is told by itself, and the log is another's
        except (OSError, UserError) as error:
            # The new one is written. Too many old ones are no reason to end a run, and if the disk
            # fills up the next save says so.
            self._say(f"warning: older checkpoints were not removed: {error}")


def _expected(trainer: Trainer) -> float:
    """Seconds of a save, by what this rank has to write of the state, windows not counted."""
    size = sum(shard.weights.nbytes * (1 + len(shard.kept)) for shard in trainer.shards())
    if trainer.optimizer.alike_on_nodes:
        size //= trainer.layout.nodes
    return size / _SLOW_DISK


def saves(checkpoint: CheckpointConfig) -> bool:
    """Whether a run saves at all."""
    return checkpoint.every is not None or bool(checkpoint.steps)


def store_of(run: RunConfig) -> Store:
    """Where a run's checkpoints are."""
    return Store(Path(run.dir) / FOLDER)
