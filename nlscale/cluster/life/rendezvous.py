"""How the ranks of a run find each other: each says that it is here, and who is missing is named.

The store is torchrun's where it has one, else the first rank's.
"""

from __future__ import annotations

import datetime
import itertools
import socket
import time
from dataclasses import dataclass

import torch.distributed as dist

from nlscale.cluster.life.place import Place, read_place
from nlscale.errors import LostRank, SaidElsewhere, UserError

_POLL_SECONDS = 0.1
_servers: dict[str, dist.Store] = {}
"""The stores that this process serves, by meeting point: one is enough for all of its meetings."""
_meetings = itertools.count()
_OTHERS_SECONDS = 1.0
"""For which the rank that gives up, and may hold the store, waits for the others to give up too."""


@dataclass(frozen=True)
class Rendezvous:
    """The ranks of a run, all of them present."""

    place: Place
    """Of this rank."""
    hosts: tuple[str, ...]
    """Name of the host of each rank."""
    store: dist.Store
    """For the process groups."""
    prefix: str
    """Of this meeting's keys in it."""

    def another_client(self) -> dist.Store:
        """A connection of its own to the store, for a thread: a client serves one at a time."""
        client = connect(self.place.address, self.place.port, False, 30.0)
        return dist.PrefixStore(self.prefix, client)


def meet(seconds: float) -> Rendezvous:
    """Wait until all ranks of the environment have come, for at most `seconds`.

    Raises:
        UserError: the environment lacks a variable or says nonsense.
        LostRank: the first rank cannot be reached, or some rank has not come in time.
    """
    here, until = read_place(), time.monotonic() + seconds
    rank, world = here.rank, here.world
    if rank >= world:
        raise UserError(f"RANK {rank} is not one of WORLD_SIZE {world}; ranks count from 0")
    client = _reach(here, seconds)
    prefix = f"restart{here.restart}/meeting{next(_meetings)}"
    store = dist.PrefixStore(prefix, client)
    store.set(_sign_of(rank), socket.gethostname())
    try:
        absent = list(range(world))
        while absent := [r for r in absent if not store.check([_sign_of(r)])]:
            if time.monotonic() > until:
                raise _not_all_came(here, absent, store, seconds)
            time.sleep(_POLL_SECONDS)
        hosts = [store.get(_sign_of(r)).decode() for r in range(world)]
    except dist.DistError:
        raise SaidElsewhere("the first rank has gone", LostRank.exit_code) from None
    return Rendezvous(here, tuple(hosts), store, prefix)


def connect(host: str, port: int, serves: bool, seconds: float) -> dist.TCPStore:
    """A client of the store there, in that time; opens the store first if it `serves`."""
    timeout = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)


def name_ranks(ranks: list[int], most: int = 8) -> str:
    """`rank 3`, or `ranks 3, 5, 7`; at most so many by number."""
    shown = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


def _reach(here: Place, seconds: float) -> dist.Store:
    """A client of the store, which the first rank opens unless torchrun has."""
    where = here.meeting_point
    try:
        if here.opens_store and where not in _servers:
            _servers[where] = connect(here.address, here.port, True, seconds)
        return connect(here.address, here.port, False, seconds)
    except (dist.DistError, RuntimeError, ValueError) as error:
        failed = "cannot serve at" if here.opens_store else "did not reach the first rank at"
        raise LostRank(
            f"{here.who} {failed} {where} within {seconds:g} s: "
            f"{' '.join(str(error).split())[:160]}; check that the first node runs, that nothing "
            f"else listens there, and MASTER_ADDR, MASTER_PORT, firewall"
        ) from None


def _sign_of(rank: int) -> str:
    return f"here/{rank}"


def _not_all_came(here: Place, absent: list[int], store: dist.Store, seconds: float) -> UserError:
    """What to raise where ranks are missing: the first that is there says so."""
    present = [r for r in range(here.world) if r not in absent]
    hosts = sorted({store.get(_sign_of(r)).decode() for r in present})
    message = (
        f"{len(absent)} of {here.world} ranks did not come within {seconds:g} s: "
        f"{name_ranks(absent)}; those that came are on {', '.join(hosts)}. Look at the output of "
        f"the others, or raise timeouts.startup"
    )
    if here.rank != present[0]:
        return SaidElsewhere(message, LostRank.exit_code)
    time.sleep(_OTHERS_SECONDS)
    return LostRank(message)
