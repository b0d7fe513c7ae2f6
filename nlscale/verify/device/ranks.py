"""The ranks of one `nlscale bench device`: the first says what is measured, the others follow.

They speak through the store in which they met; no process group is made, and no GPU is touched,
outside of the processes of the parts. Alone, a rank has nobody to tell.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from nlscale.cluster.life.place import place
from nlscale.cluster.life.rendezvous import meet
from nlscale.errors import LostRank

_MEET_SECONDS = 300.0
_POLL_SECONDS = 0.1
_FOLLOW_SECONDS = 3600.0
_HEAR_SECONDS = 10.0
_START_AGAIN = "see the logs of the other ranks, and start again: what is done is not done again"
_SLACK_SECONDS = 60.0
"""That a rank may be late by when it says how a part has ended."""


class Ranks:
    """This rank, and the way to the others."""

    def __init__(self, tiny: bool) -> None:
        self.here = place()
        self._store: dist.Store | None = None
        if self.here.world > 1:
            self._store = meet(_MEET_SECONDS, {"--tiny": tiny}).store
        self._orders = 0

    @property
    def first(self) -> bool:
        return self.here.rank == 0

    def order(self, order: dict[str, Any]) -> None:
        """The first rank says what is next: a part and its seconds, or the exit code."""
        self._orders += 1
        if self._store is not None:
            self._store.set(f"order{self._orders}", json.dumps(order))

    def end(self) -> None:
        """The first rank says that this was all, and waits a little until the others have heard."""
        self.order({"end": True})
        if self._store is None:
            return
        until = time.monotonic() + _HEAR_SECONDS
        heard = [f"heard{rank}" for rank in range(1, self.here.world)]
        while not self._store.check(heard) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def next_order(self) -> dict[str, Any]:
        """What the first rank has said.

        Raises:
            LostRank: it says nothing for an hour, or has gone.
        """
        self._orders += 1
        order: dict[str, Any] = json.loads(self._get(f"order{self._orders}", _FOLLOW_SECONDS))
        if "end" in order and self._store is not None:
            self._store.set(f"heard{self.here.rank}", "")
        return order

    def together(self) -> dict[str, str]:
        """The place of a process that does a part with those of the other ranks.

        They meet at a port of their own: the one of the command is taken, by itself or by torchrun.
        """
        if self._store is None:
            return {}
        key = f"port{self._orders}"
        if self.first:
            self._store.set(key, str(_free_port()))
        here = self.here
        return {
            "RANK": str(here.rank),
            "WORLD_SIZE": str(here.world),
            "LOCAL_RANK": str(here.local_rank),
            "LOCAL_WORLD_SIZE": str(here.local_world),
            "MASTER_ADDR": here.address,
            "MASTER_PORT": self._get(key, _SLACK_SECONDS),
        }

    def give_up(self) -> bool:
        """Whether a rank has failed at the present part: the others would wait for it in vain."""
        with _first_is_there():
            return self._store is not None and self._store.check([f"failed{self._orders}"])

    def tell(self, outcome: dict[str, Any]) -> None:
        """How the part has ended here: `result` or `error`."""
        if self._store is None:
            return
        outcome = {"who": self.here.who, **outcome}
        with _first_is_there():
            if outcome.get("error"):
                self._store.set(f"failed{self._orders}", "")
            self._store.set(f"outcome{self._orders}.{self.here.rank}", json.dumps(outcome))

    def outcomes(self) -> list[dict[str, Any]]:
        """Of the other ranks, in their order.

        Raises:
            LostRank: one says nothing.
        """
        others = range(1, self.here.world if self._store is not None else 1)
        return [
            json.loads(self._get(f"outcome{self._orders}.{rank}", _SLACK_SECONDS))
            for rank in others
        ]

    def _get(self, key: str, seconds: float) -> str:
        assert self._store is not None
        until = time.monotonic() + seconds
        with _first_is_there():
            while not self._store.check([key]):
                if time.monotonic() > until:
                    raise LostRank(f"no rank has said {key} within {seconds:.0f} s; {_START_AGAIN}")
                time.sleep(_POLL_SECONDS)
            return str(self._store.get(key).decode())


@contextmanager
def _first_is_there() -> Iterator[None]:
    """Around what is asked of the store, which goes when the first rank does."""
    try:
        yield
    except dist.DistError:
        raise LostRank(f"the first rank has gone; {_START_AGAIN}") from None


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])
