"""How the ranks of a run find each other: each says that it is here, and who is missing is named.

The environment is torch.distributed's (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), as set by
torchrun, by launch/slurm/train.sbatch or by DeepSpeed's launcher. The store is torchrun's where it
has one, else the first rank's.
"""

from __future__ import annotations

import datetime
import itertools
import os
import socket
import time
from dataclasses import dataclass

import torch.distributed as dist

from nlscale.errors import LostRank, SaidElsewhere, UserError

_POLL_SECONDS = 0.1
_servers: dict[str, dist.Store] = {}
"""The stores that this process serves, by address: one is enough for all of its meetings."""
_meetings = itertools.count()
_OTHERS_SECONDS = 1.0
"""For which the rank that gives up, and may hold the store, waits for the others to give up too."""


@dataclass(frozen=True)
class Meeting:
    """The ranks of a run, all of them present."""

    rank: int
    hosts: tuple[str, ...]
    """Name of the host of each rank."""
    store: dist.Store
    """For the process groups."""
    address: str
    """Where the store is, `host:port`."""
    prefix: str
    """Of this meeting's keys in it."""

    def another_client(self) -> dist.Store:
        """A connection of its own to the store, for a thread: a client serves one at a time."""
        host, _, port = self.address.rpartition(":")
        client = _connect(host, int(port), False, datetime.timedelta(seconds=30))
        return dist.PrefixStore(self.prefix, client)


def meet(seconds: float) -> Meeting:
    """Wait until all ranks of the environment have come, for at most `seconds`.

    Raises:
        UserError: the environment lacks a variable or says nonsense.
        LostRank: the first rank cannot be reached, or some rank has not come in time.
    """
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    host, port = _variable("MASTER_ADDR"), _number("MASTER_PORT")
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} is not one of WORLD_SIZE {world}; ranks count from 0")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until = time.monotonic() + seconds
    address = f"{host}:{port}"
    try:
        if serves and address not in _servers:
            _servers[address] = _connect(host, port, True, datetime.timedelta(seconds=seconds))
        client = _connect(host, port, False, datetime.timedelta(seconds=seconds))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise LostRank(
            f"rank {rank} on {socket.gethostname()} "
            f"{'cannot serve at' if serves else 'did not reach the first rank at'} {address} "
            f"within {seconds:g} s: {' '.join(str(error).split())[:160]}; check that the first "
            f"node runs, that nothing else listens there, and MASTER_ADDR, MASTER_PORT, firewall"
        ) from None
    # torchrun keeps its store over a restart, and with it what the last attempt left there
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"restart{restart}/meeting{next(_meetings)}"
    store = dist.PrefixStore(prefix, client)
    store.set(_here(rank), socket.gethostname())
    try:
        absent = list(range(world))
        while absent := [r for r in absent if not store.check([_here(r)])]:
            if time.monotonic() > until:
                raise _not_all_came(rank, absent, world, store, seconds)
            time.sleep(_POLL_SECONDS)
        hosts = [store.get(_here(r)).decode() for r in range(world)]
    except dist.DistError:
        raise SaidElsewhere("the first rank has gone", LostRank.exit_code) from None
    return Meeting(rank, tuple(hosts), store, address, prefix)


def _connect(host: str, port: int, serves: bool, timeout: datetime.timedelta) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)


def _here(rank: int) -> str:
    return f"here/{rank}"


def _not_all_came(
    rank: int, absent: list[int], world: int, store: dist.Store, seconds: float
) -> UserError:
    """What to raise where ranks are missing: the first that is there says so."""
    present = [r for r in range(world) if r not in absent]
    hosts = sorted({store.get(_here(r)).decode() for r in present})
    message = (
        f"{len(absent)} of {world} ranks did not come within {seconds:g} s: "
        f"{name_ranks(absent)}; those that came are on {', '.join(hosts)}. Look at the output of "
        f"the others, or raise timeouts.startup"
    )
    if rank != present[0]:
        return SaidElsewhere(message, LostRank.exit_code)
    time.sleep(_OTHERS_SECONDS)
    return LostRank(message)


def name_ranks(ranks: list[int], most: int = 8) -> str:
    """`rank 3`, or `ranks 3, 5, 7`; at most so many by number."""
    shown = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError(f"RANK is set but {name} is not; start with torchrun or launch/slurm")
    return value


def _number(name: str) -> int:
    value = _variable(name)
    if not value.isdigit():
        raise UserError(f"{name}={value!r} is not a number; start with torchrun or launch/slurm")
    return int(value)
