"""Ranks that ask a model together: they share parts of the work, and exchange what JSON holds.

Each has the whole model. They meet in a store, that of torchrun or the first rank's; there are no
process groups, which a model that is loaded by `nlscale.load` has no use for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nlscale.cluster.life.place import Place, place
from nlscale.errors import LostRank, SaidElsewhere, UserError

_POLL_SECONDS = 0.05
_MEET_SECONDS = 300.0
_GOODBYE_SECONDS = 20.0
_FAILED, _FAILURES = "failed", "failures"
"""Set by the rank that fails first, to its exit code; and how many have."""
_GONE = "gone"


class Ranks:
    """This rank and the others; `begin` makes one. Every method is called on all of them alike.

    Attributes:
        rank, world: its number, and how many there are
        local_rank: its number on its node
    """

    def __init__(self, here: Place, store: Any) -> None:
        self.rank, self.world, self.local_rank = here.rank, here.world, here.local_rank
        self._store = store
        self._exchanges = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """What the first rank passed."""
        if self._store is None:
            return value
        key = self._next()
        if self.first:
            self._store.set(key, json.dumps(value))
            return value
        return self._get(key)

    def gather(self, value: Any) -> list[Any]:
        """What each rank passed, by rank."""
        if self._store is None:
            return [value]
        key = self._next()
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        return [self._get(f"{key}/{rank}") for rank in range(self.world)]

    def share(self, count: int) -> Share:
        """`count` pieces of work, to be shared out as ranks ask for them."""
        return Share(self, self._next() if self._store is not None else "", count)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, the failure of one ends the others; none leaves before all have done."""
        try:
            yield
            if self._store is not None:
                self._part()
        except SaidElsewhere:
            raise
        except BaseException as error:
            if self._store is not None:
                self._fail(error)
            raise

    def _part(self) -> None:
        """The first waits until the others have read what is in its store."""
        self.gather(None)
        self._store.add(_GONE, 1)
        until = time.monotonic() + _GOODBYE_SECONDS
        while self.first and self._store.add(_GONE, 0) < self.world and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def _fail(self, error: BaseException) -> None:
        """Tell the others; who comes second says nothing of it where it is a line for the user."""
        code = getattr(error, "exit_code", 1)
        if self._store.add(_FAILURES, 1) > 1 and isinstance(error, UserError):
            raise SaidElsewhere("another rank has failed first", code) from error
        self._store.set(_FAILED, str(code))
        if isinstance(error, UserError):
            error.told = True
        if self.first:
            time.sleep(20 * _POLL_SECONDS)  # for the others to hear it, whose store this may be

    def _next(self) -> str:
        self._exchanges += 1
        return f"exchange{self._exchanges}"

    def _get(self, key: str) -> Any:
        while not self._store.check([key]):
            self.heed()
            time.sleep(_POLL_SECONDS)
        return json.loads(self._store.get(key))

    def heed(self) -> None:
        """Raises SaidElsewhere: another rank has failed."""
        if self._store is not None and self._store.check([_FAILED]):
            code = int(self._store.get(_FAILED))
            raise SaidElsewhere("another rank has failed", code)


class Share:
    """Pieces of work by number, of which each is one rank's; `Ranks.share` makes it."""

    def __init__(self, ranks: Ranks, key: str, count: int) -> None:
        self._ranks, self._key = ranks, key
        self._store = ranks._store
        self._open = set(range(count))
        """Of the first rank: those of which it does not know what came of them."""
        self._count = count

    def mine(self) -> Iterator[int]:
        """The numbers of the pieces that are this rank's, as long as there are any."""
        for number in self._numbers():
            self._open.discard(number)
            yield number

    def hand_in(self, number: int, value: Any) -> None:
        """Give the first rank what came of a piece."""
        self._store.set(f"{self._key}/{number}", json.dumps(value))

    def handed_in(self) -> Iterator[tuple[int, Any]]:
        """On the first rank: what others have handed in since it was last asked for."""
        if not self._ranks.first or self._store is None:
            return
        self._ranks.heed()
        for number in sorted(self._open):
            key = f"{self._key}/{number}"
            if self._store.check([key]):
                self._open.discard(number)
                yield number, json.loads(self._store.get(key))

    def rest(self) -> Iterator[tuple[int, Any]]:
        """On the first rank: what others still hand in, until all is there."""
        while self._ranks.first and self._open:
            yield from self.handed_in()
            time.sleep(_POLL_SECONDS)

    def _numbers(self) -> Iterator[int]:
        if self._store is None:
            yield from range(self._count)
            return
        while (number := self._store.add(self._key, 1) - 1) < self._count:
            yield number


def begin() -> Ranks:
    """The ranks that the environment names, once all can be heard; a single one without any.

    Raises:
        UserError: the environment says nonsense.
        LostRank: the store of the first rank cannot be reached.
    """
    here = place()
    if here.world == 1:
        return Ranks(here, None)
    import torch.distributed as dist

    from nlscale.cluster.life.rendezvous import connect

    try:
        client = connect(here.address, here.port, here.opens_store, _MEET_SECONDS)
    except dist.DistError:
        raise LostRank(
            f"{here.who} does not reach the first rank at {here.meeting_point} in "
            f"{_MEET_SECONDS:.0f} s"
        ) from None
    return Ranks(here, dist.PrefixStore(f"restart{here.restart}/eval", client))
