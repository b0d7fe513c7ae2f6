"""How the ranks of a run find each other: each says that it is here, and who is missing is named.

The store is torchrun's where it has one, else the first rank's. Each rank leaves there its host and
what it was told: how many ranks, which version, which configuration. The first rank waits for all,
compares, and gives one verdict that all others wait for. The store counts who has come, and a rank
that waits asks for one key, so that what is asked of it grows with the number of ranks and not with
its square. Ranks that were told different things would train
something that nobody asked for; the run ends instead, on all of them, with one line.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

import nlscale
from nlscale.cluster.life.place import Place, place
from nlscale.errors import LostRank, SaidElsewhere, UserError

_POLL_SECONDS = 0.1
_RANKS_A_POLL = 500
"""So many more ranks, and each asks so much less often again."""
_servers: dict[str, dist.Store] = {}
"""The stores that this process serves, by meeting point: one is enough for all of its meetings."""
_meetings = itertools.count()
_OTHERS_SECONDS = 5.0
"""For which the rank that gives up, and may hold the store, waits for the others to hear why."""
_VERDICT = "verdict"
"""Who sets it first decides for all: the first rank, or one that objects."""
_ARRIVED = "arrived"
"""How many ranks have come."""
_ALL_ARRIVED = "all arrived"
"""Set by the last that comes, and by one that objects: what the first rank waits for."""
_FIRST = "first"
"""The sign of the first rank, or nothing where one objects: what the others wait for."""
ENDING = "ending"
"""Where, once the ranks have met, one says why the run ends: see `nlscale.cluster.life.watch`."""
_SHOWN_KEYS = 3
Told = Mapping[str, Any]
"""What a rank was told, by the name that a person knows it by; a mapping is compared by key."""


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


def meet(seconds: float, told: Told | None = None) -> Rendezvous:
    """Wait until all ranks of the environment have come, for at most `seconds`.

    Args:
        seconds: for which the first rank waits for the others, from when it has come itself.
        told: what this rank was told, beside the number of ranks; plain values that JSON holds.

    Raises:
        UserError: the environment says nonsense, a rank came twice, or a rank was told something
            else than the first.
        LostRank: the first rank cannot be reached, or some rank has not come in time.
        SaidElsewhere: the first rank says which of these it is.
    """
    return meet_from(place(), next(_meetings), seconds, told or {})


def meet_from(here: Place, number: int, seconds: float, told: Told) -> Rendezvous:
    """As `meet`, from a place that the environment need not name.

    Args:
        here: the place.
        number: how many meetings its ranks have had in the store before.
        seconds: as for `meet`.
        told: likewise.
    """
    until = time.monotonic() + seconds
    client = _reach(here, seconds)
    prefix = f"restart{here.restart}/meeting{number}"
    store = dist.PrefixStore(prefix, client)
    try:
        _sign(here, store, told)
        verdict = (_judge if here.rank == 0 else _wait)(here, store, until, seconds)
        if "why" in verdict:
            store.set(_heard_by(here.rank), "")
    except dist.DistError:
        raise SaidElsewhere("the first rank has gone", LostRank.exit_code) from None
    if here.rank == 0 and "why" in verdict:
        _until_heard(here, store)
    if "why" in verdict:
        raise _reason(here, verdict)
    return Rendezvous(here, tuple(verdict["hosts"]), store, prefix)


def connect(host: str, port: int, serves: bool, seconds: float) -> dist.TCPStore:
    """A client of the store there, in that time; opens the store first if it `serves`."""
    timeout = datetime.timedelta(seconds=seconds)
    return dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=timeout)


def arrive(store: dist.Store, what: str, ranks: int, everyone: str) -> None:
    """Count this rank among those that have come so far, and set a key when all of them have."""
    if store.add(what, 1) >= ranks:
        store.set(everyone, "")


def wait_for(store: dist.Store, key: str, ranks: int, until: float) -> bool:
    """Whether the key is set by that time on the monotonic clock; all ranks may wait for it.

    It asks again and again: a signal is not heard while the store itself is waited in.
    """
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS * (1 + ranks / _RANKS_A_POLL))
    return True


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


def _sign(here: Place, store: dist.Store, told: Told) -> None:
    """Say that this rank is here, and what it was told."""
    plain = {"WORLD_SIZE": here.world, "nlscale": nlscale.__version__, **told}
    text = json.dumps(plain, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    # torchrun counts the ranks itself, and its store may remember those of a start before
    if not here.torchrun_has_store and store.add(f"claims/{here.rank}", 1) > 1:
        raise _object(
            here,
            store,
            f"{here.who} has come before: another process was told the same RANK={here.rank} of "
            f"WORLD_SIZE={here.world}; see who starts the ranks",
        )
    sign = json.dumps({"host": socket.gethostname(), "told": checksum, "world": here.world})
    # Only the first rank's of what was told is read again, and that of the first that differs.
    both = [_told_to(here.rank), _sign_of(here.rank)]
    store.multi_set(both, [text, sign])  # type: ignore[attr-defined]  # which torch's stubs lack
    if here.rank == 0:
        store.compare_set(_FIRST, "", sign)
    arrive(store, _ARRIVED, here.world, _ALL_ARRIVED)


def _judge(here: Place, store: dist.Store, until: float, seconds: float) -> dict[str, Any]:
    """On the first rank: wait for the others, compare what they were told, and say the verdict."""
    signs = [_sign_of(r) for r in range(here.world)]
    wait_for(store, _ALL_ARRIVED, here.world, until)
    # The count is right but where ranks that were told other numbers, or a start before, are in it.
    while not (complete := store.check(signs)):
        if store.check([_VERDICT]) or time.monotonic() > until:
            break
        time.sleep(_POLL_SECONDS)
    if complete:
        return _decide(store, _compare(store, [json.loads(s) for s in store.multi_get(signs)]))
    message = _not_all_came(here, store, seconds)
    return _decide(store, _why(message, LostRank.exit_code, 0))


def _compare(store: dist.Store, signs: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on ranks that have all come."""
    hosts = [sign["host"] for sign in signs]
    odd = [r for r, sign in enumerate(signs) if sign["told"] != signs[0]["told"]]
    if odd:
        return _why(_difference(store, odd, hosts), UserError.exit_code, 0)
    return {"hosts": hosts}


def _wait(here: Place, store: dist.Store, until: float, seconds: float) -> dict[str, Any]:
    """On the other ranks: the verdict of the first, which has as long again when it comes late."""
    if not wait_for(store, _FIRST, here.world, until):
        return _without_the_first(here, store, seconds)
    _object_to_world(here, store)
    if not wait_for(store, _VERDICT, here.world, until + seconds + _OTHERS_SECONDS):
        message = f"rank 0 came and was lost before all ranks had met ({here.who} waited for it)"
        return _give_up(store, _why(message, LostRank.exit_code, here.rank))
    return _read(store.get(_VERDICT))


def _give_up(store: dist.Store, verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict that counts; a first rank that comes late does not wait for others any more."""
    found = _decide(store, verdict)
    store.set(_ALL_ARRIVED, "")
    return found


def _decide(store: dist.Store, verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict that counts: this one, unless there is one."""
    return _read(store.compare_set(_VERDICT, "", json.dumps(verdict)))


def _read(verdict: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(verdict)
    return found


def _object_to_world(here: Place, store: dist.Store) -> None:
    """Refuse to meet a first rank that counts other ranks: it may not wait for this one at all."""
    first = json.loads(store.get(_FIRST))
    if first is None or first["world"] == here.world:
        return
    message = (
        f"{here.who} was told WORLD_SIZE={here.world}, and rank 0 on {first['host']} "
        f"WORLD_SIZE={first['world']}; see who starts the ranks: all must be told the same"
    )
    error = _object(here, store, message)
    store.set(_heard_by(here.rank), "")
    raise error


def _object(here: Place, store: dist.Store, message: str) -> UserError:
    """End the run on all ranks, also on those that have met already; what to raise here."""
    mine = _why(message, UserError.exit_code, _me())
    verdict = _decide(store, mine)
    store.compare_set(_FIRST, "", json.dumps(None))
    store.set(_ALL_ARRIVED, "")
    if "why" in verdict:  # this, or what another has found before
        return _reason(here, verdict)
    ending = {"rank": here.rank, "message": message, "exit_code": mine["code"], "lost": [here.rank]}
    store.compare_set(ENDING, "", json.dumps(ending))
    return _reason(here, mine)


def _without_the_first(here: Place, store: dist.Store, seconds: float) -> dict[str, Any]:
    """The verdict where the first rank does not come; one rank, which gives up first, finds it."""
    if store.add("gave up", 1) == 1:
        message = _not_all_came(here, store, seconds)
        return _give_up(store, _why(message, LostRank.exit_code, here.rank))
    if wait_for(store, _VERDICT, here.world, time.monotonic() + 2 * _OTHERS_SECONDS):
        return _read(store.get(_VERDICT))
    message = f"rank 0 did not come within {seconds:g} s ({here.who} waited for it)"
    return _give_up(store, _why(message, LostRank.exit_code, here.rank))


def _reason(here: Place, verdict: dict[str, Any]) -> UserError:
    """What to raise of a verdict that ends the run; one rank says it."""
    message, code = verdict["why"], verdict["code"]
    if verdict["from"] not in (here.rank, _me()):
        return SaidElsewhere(message, code)
    error = LostRank(message) if code == LostRank.exit_code else UserError(message)
    error.told = True
    return error


def _why(message: str, code: int, speaker: int | str) -> dict[str, Any]:
    """A verdict that ends the run; the speaker, a rank or a process, says it."""
    return {"why": message, "code": code, "from": speaker}


def _me() -> str:
    """This process, also where another has the same rank."""
    return f"{socket.gethostname()}/{os.getpid()}"


def _difference(store: dist.Store, odd: list[int], hosts: list[str]) -> str:
    """What the first of these ranks was told otherwise than rank 0, with both values."""
    first, other = (json.loads(store.get(_told_to(r))) for r in (0, odd[0]))
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    parts = [
        f"{name} {_short(a)} (rank 0 on {hosts[0]}: {_short(b)})"
        for name, a, b in itertools.chain.from_iterable(
            _leaves(key, other.get(key), first.get(key)) for key in keys
        )
    ]
    shown = "; ".join(parts[:_SHOWN_KEYS])
    more = f" and {len(parts) - _SHOWN_KEYS} more" if len(parts) > _SHOWN_KEYS else ""
    others = f" (so were {name_ranks(odd[1:])})" if odd[1:] else ""
    return (
        f"rank {odd[0]} on {hosts[odd[0]]} was told something else than rank 0{others}: "
        f"{shown}{more}; give all nodes the same recipe, overrides and installation"
    )


def _leaves(key: str, mine: Any, first: Any) -> list[tuple[str, Any, Any]]:
    """The differing values of two trees, with their dotted keys."""
    if not (isinstance(mine, dict) and isinstance(first, dict)):
        return [] if mine == first else [(key, mine, first)]
    found = []
    for name in {**first, **mine}:
        found += _leaves(f"{key}.{name}" if key else name, mine.get(name), first.get(name))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _until_heard(here: Place, store: dist.Store) -> None:
    """Keep the store alive until those that are there have the verdict, or for a while."""
    until = time.monotonic() + _OTHERS_SECONDS
    heard = [_heard_by(r) for r in _present(here, store)]
    while not store.check(heard) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)


def _present(here: Place, store: dist.Store) -> list[int]:
    """The ranks that have come. It asks for one after the other: where a run ends, on one rank."""
    return [r for r in range(here.world) if store.check([_sign_of(r)])]


def _sign_of(rank: int) -> str:
    return f"here/{rank}"


def _told_to(rank: int) -> str:
    return f"told/{rank}"


def _heard_by(rank: int) -> str:
    return f"verdict heard/{rank}"


def _not_all_came(here: Place, store: dist.Store, seconds: float) -> str:
    """What to say where ranks are missing."""
    present = _present(here, store)
    absent = sorted(set(range(here.world)) - set(present))
    signs = store.multi_get([_sign_of(r) for r in present])
    hosts = sorted({json.loads(sign)["host"] for sign in signs})
    return (
        f"{len(absent)} of {here.world} ranks did not come within {seconds:g} s: "
        f"{name_ranks(absent)}; those that came are on {', '.join(hosts)}. Look at the output of "
        f"the others, or raise timeouts.startup"
    )
