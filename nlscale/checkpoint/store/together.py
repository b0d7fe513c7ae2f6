"""Ranks that work together and fail together: an error of one is raised by all, none waits."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from nlscale.checkpoint.store.safe import CheckpointError
from nlscale.errors import Stopped, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """What went wrong on a rank, as it is told to the others."""

    who: str
    """Rank and host; empty for a process alone."""
    reason: str
    disk_full: bool


def _reason_of_the_first(failures: list[Failure]) -> str:
    return failures[0].reason


def _nothing() -> None:
    pass


class Ranks:
    """The ranks of a gloo group, or this process alone.

    Work is done in parts, by `each` or by `first`; what fails on one rank is raised on all, in the
    same call. A rank that is gone is noticed by the group: at once where its process ended, else
    after the group's timeout, which must exceed what the slowest rank takes for a part.

    A signal that stops this process stops it here too; the others learn of it as of a lost rank.

    Args:
        group: the ranks; None: this process alone.
        describe: makes an error's one line of the failures, on the first rank.
        undo: called on the first rank after a failure, before it is described and told.
        beside: whether this goes on beside something else, which will notice a rank that is gone
            and say so. Else that is a RuntimeError here, for who says it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        describe: Callable[[list[Failure]], str] = _reason_of_the_first,
        undo: Callable[[], None] = _nothing,
        beside: bool = False,
    ) -> None:
        self._group = group
        self._describe = describe
        self._undo = undo
        self._beside = beside
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._who = "" if group is None else f"rank {dist.get_rank()} on {socket.gethostname()}"

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do a part of the work on every rank.

        Returns:
            The values by rank on the first rank; an empty list on the others.

        Raises:
            CheckpointError: it failed on one of them.
        """
        value, failure, error = self._try(work)
        outcomes = self._gather((value, failure))
        self._settle([failure for _, failure in outcomes if failure is not None], error)
        return [value for value, _ in outcomes]

    def first(self, work: Callable[[], T]) -> T:
        """Do a part of the work on the first rank; its value on every rank. Raises like `each`."""
        value, failure, error = self._try(work) if self.rank == 0 else (None, None, None)
        return self._settle([failure] if failure is not None else [], error, value)

    def _try(self, work: Callable[[], T]) -> tuple[T | None, Failure | None, Exception | None]:
        try:
            return work(), None, None
        except Stopped:
            raise
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            return None, Failure(self._who, _reason(error), full), error

    def _gather(self, outcome: tuple[Any, Failure | None]) -> list[tuple[Any, Failure | None]]:
        if self._group is None:
            return [outcome]
        outcomes = [outcome] * self.size if self.rank == 0 else None
        with self._in_touch():
            dist.gather_object(outcome, outcomes, group=self._group, group_dst=0)
        return outcomes or []

    def _settle(self, failures: list[Failure], error: Exception | None, value: Any = None) -> Any:
        """Tell all ranks what the first one has; raise on all where it has a failure."""
        said = None
        if failures:
            self._undo()
            said = self._describe(failures)
        told = [said, value]
        if self._group is not None:
            with self._in_touch():
                dist.broadcast_object_list(told, group=self._group, group_src=0)
        if told[0] is not None:
            raise CheckpointError(told[0]) from error
        return told[1]

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = Failure(self._who, f"lost touch with another rank: {_reason(error)}", False)
            if self.rank == 0:
                self._undo()
            if not self._beside:
                raise
            raise CheckpointError(self._describe([lost])) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    text = str(error).partition("\n")[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
