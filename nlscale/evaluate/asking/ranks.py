"""Ranks that ask a model together: they share parts of the work, and exchange what JSON holds.

Each has the whole model. They meet in a store, that of torchrun or the first rank's; there are no
process groups, which a model that is loaded by `nlscale.load` has no use for. They are watched as
those of a run are: one that is lost ends all of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nlscale.cluster.life.place import place
from nlscale.config.vocabulary import TimeoutsConfig
from nlscale.errors import SaidElsewhere, UserError

_POLL_SECONDS = 0.05
_MEET_SECONDS = 300.0
_SILENCE_SECONDS = 60.0
"""A rank of which nothing is heard for so long is lost, as by default while a model trains."""
_GOODBYE_SECONDS = 20.0
_FAILED = "failed"
"""Set by the rank that fails first, to what it has to say and its exit code."""
_LAST_SECONDS = 1.0
_GONE = "gone"
_GOES_ON = "the same command goes on with what was found"


class Ranks:
    """This rank and the others; `together` makes one. Every method is called on all of them alike.

    Args:
        rank: its number.
        world: how many there are.
        local_rank: its number on its node.
        store: in which they meet; None: there are no others.
        ending: whether a rank has said why all of them end.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        store: Any = None,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._store, self._ending = store, ending
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

    def share(self, count: int) -> SharedWork:
        """`count` pieces of work, to be shared out as ranks ask for them."""
        return SharedWork(self, self._next() if self._store is not None else "", count)

    @contextmanager
    def trying(self, what: str) -> Iterator[Ranks]:
        """These ranks, for work that may fail by itself: what one of them cannot do, all leave.

        They can go on with something else then. Only errors that a user can mend are such
        failures; others, and lost ranks, end all of them.

        Args:
            what: unlike that of all other such work.

        Raises:
            UserError: what the first rank that failed has to say; on all of them alike.
        """
        if self._store is None:
            yield self
            return
        import torch.distributed as dist

        store = dist.PrefixStore(what, self._store)
        inner = Ranks(self.rank, self.world, self.local_rank, store, self._ending)
        try:
            yield inner
            inner.gather(None)  # nobody goes on before it is known that all have done
        except SaidElsewhere:
            raise
        except UserError as error:
            mine = json.dumps([str(error), error.exit_code])
            message, code = json.loads(store.compare_set(_FAILED, "", mine))
            first = UserError(message)
            first.exit_code = code
            raise first from error

    def part(self) -> None:
        """The last of all: the first rank waits until the others have read what is in its store."""
        if self._store is None:
            return
        self.gather(None)
        self._store.add(_GONE, 1)
        until = time.monotonic() + _GOODBYE_SECONDS
        while self.first and self._store.add(_GONE, 0) < self.world and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def _next(self) -> str:
        self._exchanges += 1
        return f"exchange{self._exchanges}"

    def _get(self, key: str) -> Any:
        while not self._store.check([key]):
            self.heed()
            time.sleep(_POLL_SECONDS)
        return json.loads(self._store.get(key))

    def heed(self) -> None:
        """Leave what another rank has failed at.

        Raises:
            SaidElsewhere: it has said why all of them end.
            UserError: see `trying`.
        """
        if self._store is None:
            return
        if self._ending():
            raise SaidElsewhere("another rank has failed", 1)  # whose exit code the watch knows
        if self._store.check([_FAILED]):
            raise UserError("another rank has failed")  # which `trying` says


class SharedWork:
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
            self._ranks.heed()
            yield number


@contextmanager
def _first_leaves_last(rank: int) -> Iterator[None]:
    """Where ranks fail: the others may still be told by a store that is the first rank's."""
    try:
        yield
    except BaseException:
        if rank == 0:
            time.sleep(_LAST_SECONDS)
        raise


@contextmanager
def together(told: Mapping[str, Any]) -> Iterator[Ranks]:
    """The ranks that the environment names, once all have come; a single one without any.

    Inside, the failure of one ends the others, and so does one that is lost; none leaves before all
    have done.

    Args:
        told: what this rank was told; all must be told the same.

    Raises:
        UserError: the environment says nonsense, or ranks were told different things.
        LostRank: one has not come, or was lost.
        SaidElsewhere: another rank says why all of them end.
    """
    if place().world == 1:
        yield Ranks()
        return
    from nlscale.cluster.life.rendezvous import ENDING, meet
    from nlscale.cluster.life.watch import Watch, doing

    meeting = meet(_MEET_SECONDS, told)
    here, store = meeting.place, meeting.store
    timeouts = TimeoutsConfig(
        startup=_MEET_SECONDS, step=math.inf, checkpoint=math.inf, silence=_SILENCE_SECONDS
    )
    watch = Watch(meeting, timeouts, lambda reason: None, _GOES_ON, steps=False)
    with _first_leaves_last(here.rank), watch, watch.telling(), doing("asking"):
        ranks = Ranks(here.rank, here.world, here.local_rank, store, lambda: store.check([ENDING]))
        yield ranks
        ranks.part()
