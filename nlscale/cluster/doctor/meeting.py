"""How the ranks find each other, and talk before any process group exists.

Over a TCPStore alone: it stands when gloo or NCCL cannot connect, and that is when a doctor is
asked for. The first rank gathers what the others measured, judges, and tells them how to go on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

from torch.distributed import DistStoreError, PrefixStore, Store

from nlscale.cluster.life.place import Place, place
from nlscale.cluster.life.rendezvous import connect
from nlscale.errors import UserError

_LONG_SECONDS = 900.0  # the others wait for the first: while it lives, it waits in vain for some
_RETRY_SECONDS = 0.5
_LEAVING_SECONDS = 5.0
_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def place_among_ranks() -> Place:
    """This rank's place.

    Raises:
        UserError: it was not started as a rank; see also `nlscale.cluster.life.place.place`.
    """
    here = place()
    if not here.meets:
        raise UserError(
            f"--nodes needs {', '.join(_NEEDED)} in the environment of every rank; start it as "
            f"`torchrun --nnodes ... -m nlscale doctor --nodes`, or by srun with them set as in "
            f"launch/slurm/train.sbatch"
        )
    return here


class Meeting:
    """All ranks over one store. Values are what JSON can hold.

    Fields: `place`, `store`; `patience`: seconds for which the first rank waits for the others in
    a check, once it has come so far itself; `lost`, on the first rank: the check in which a rank
    was last waited for, by rank. A lost rank is not waited for again.
    """

    def __init__(self, here: Place, store: Store, patience: float) -> None:
        self.place = here
        self.store = store
        self.patience = patience
        self.lost: dict[int, str] = {}

    def gather(self, check: str, value: Any, ranks: Iterable[int]) -> dict[int, Any]:
        """Bring what some ranks measured to the first: by rank those that did so in time.

        Args:
            check: what it was, in the words of a person.
            value: of this rank; unused where it is not among `ranks`.
            ranks: that have something to bring.

        Returns:
            {} on other ranks than the first.
        """
        wanted = [rank for rank in ranks if rank not in self.lost]
        mine = self.place.rank
        if mine in wanted:
            self.say(f"{check}/{mine}", value)
        if mine != 0:
            return {}
        found = {}
        end = time.monotonic() + self.patience
        for rank in wanted:
            if self.reached(rank, check, f"{check}/{rank}", end - time.monotonic()):
                found[rank] = json.loads(self.store.get(f"{check}/{rank}"))
        return found

    def reached(self, rank: int, check: str, what: str, seconds: float | None = None) -> bool:
        """On the first rank: whether another says something in time; if not, it counts as lost."""
        if not _wait(self.store, what, self.patience if seconds is None else seconds):
            self.lost[rank] = check
        return rank not in self.lost

    def say(self, what: str, value: Any = None) -> None:
        """Say something once, for whoever listens."""
        self.store.set(what, json.dumps(value))

    def tell(self, what: str, value: Any = None) -> Any:
        """What the first rank has to say, on every rank.

        Raises:
            UserError: the first rank is gone.
        """
        if self.place.rank == 0:
            self.say(what, value)
            return value
        return self.hear(what)

    def hear(self, what: str, seconds: float = _LONG_SECONDS) -> Any:
        """Wait for what the first rank says.

        Raises:
            UserError: it did not in that time, or is gone.
        """
        try:
            if _wait(self.store, what, seconds):
                return json.loads(self.store.get(what))
        except RuntimeError:  # what a closed connection raises
            pass
        raise UserError(
            f"{self.place.who} hears nothing from the first rank at "
            f"{self.place.meeting_point}; its output says why"
        )

    def leave(self, code: int) -> int:
        """End together, on all ranks with the exit code of the first."""
        code = self.tell("exit code", code)
        if self.place.rank:
            self.say(f"left/{self.place.rank}")
            return code
        # the store lives in this process: it stays until all have heard
        end = time.monotonic() + _LEAVING_SECONDS
        for rank in range(1, self.place.world):
            if rank not in self.lost:
                _wait(self.store, f"left/{rank}", end - time.monotonic())
        return code


def meet(here: Place, timeout: float) -> Meeting:
    """Open the store, or connect to it.

    Args:
        here: this rank's place.
        timeout: seconds that ranks may take to be there, and to answer in a check.

    Raises:
        UserError: the first rank cannot be reached, or cannot listen; before anything hangs.
    """
    if here.opens_store:
        _can_listen(here)
    else:
        _can_reach(here, timeout)
    store = PrefixStore(f"nlscale-doctor-{here.restart}", _store(here, timeout))
    meeting = Meeting(here, store, timeout)
    if here.rank == 0:
        meeting.say("open")
    else:
        meeting.hear("open", timeout)
    return meeting


def _store(here: Place, timeout: float) -> Store:
    """The store, or a client of it; TCPStore itself waits for ever if something else answers."""
    made: list[Store] = []
    failed: list[RuntimeError] = []
    host = "localhost" if here.opens_store else here.address

    def make() -> None:
        try:
            made.append(connect(host, here.port, here.opens_store, timeout))
        except RuntimeError as error:
            failed.append(error)

    making = threading.Thread(target=make, daemon=True)
    making.start()
    making.join(timeout)
    if not made:
        why = str(failed[0]).partition("\n")[0] if failed else "something else listens there"
        raise UserError(
            f"{here.who} finds no other ranks at {here.meeting_point}: {why}; choose another "
            f"MASTER_PORT on all nodes"
        )
    return made[0]


def resolve(address: str) -> str | None:
    """What a name or address resolves to; None: nothing."""
    try:
        return str(socket.getaddrinfo(address, None)[0][4][0])
    except OSError:
        return None


def slurm_hosts() -> list[str]:
    """The hosts of the Slurm job that this process is in, in its order; none outside of one."""
    return expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))


def expand_hosts(text: str) -> list[str]:
    """`gpu[08-10,12],login` -> gpu08, gpu09, gpu10, gpu12, login."""
    hosts = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if match is None:
            hosts.append(part)
            continue
        before, numbers, after = match.groups()
        for number in numbers.split(","):
            low, _, high = number.partition("-")
            for value in range(int(low), int(high or low) + 1):
                hosts += expand_hosts(f"{before}{value:0{len(low)}d}{after}")
    return hosts


def _can_listen(here: Place) -> None:
    with socket.socket() as probing:
        probing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probing.bind(("", here.port))
        except OSError as error:
            raise UserError(
                f"{here.who} cannot listen on MASTER_PORT {here.port}: {error.strerror}; end what "
                f"uses it (`ss -ltnp`), or choose another port on all nodes"
            ) from None


def _can_reach(here: Place, timeout: float) -> None:
    if (resolved := resolve(here.address)) is None:
        raise UserError(cannot_resolve(here))
    end = time.monotonic() + timeout
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((here.address, here.port), max(left, _RETRY_SECONDS)).close()
            return
        except OSError as error:
            seen = error.strerror or str(error)
        if time.monotonic() + _RETRY_SECONDS > end:
            raise UserError(
                f"{here.who} cannot reach the first rank at {here.meeting_point} "
                f"({resolved}) in {timeout:g} s: {seen}; {_why(resolved, seen)}"
            )
        time.sleep(_RETRY_SECONDS)


def _why(resolved: str, seen: str) -> str:
    if resolved.startswith("127.") or resolved == "::1":
        return (
            "that address is this machine itself: set MASTER_ADDR to a name of the first node "
            "that the others know, or see that the first rank is started"
        )
    if "refused" in seen:
        return "that host is there and nothing listens: see that its ranks are started, or the port"
    return "let a firewall pass it, or correct MASTER_ADDR"


def cannot_resolve(here: Place) -> str:
    """What to say when MASTER_ADDR is the name of nothing."""
    return (
        f"{here.who}: MASTER_ADDR {here.address!r} does not resolve; set it to the address of the "
        f"first node, or add the name to /etc/hosts on all nodes"
    )


def _wait(store: Store, key: str, seconds: float) -> bool:
    """Whether the key is there in that time."""
    end = time.monotonic() + seconds
    while not store.check([key]):
        left = end - time.monotonic()
        if left <= 0:
            return False
        # a signal is heard between two waits, not in one
        with contextlib.suppress(DistStoreError):
            store.wait([key], datetime.timedelta(seconds=min(left, _RETRY_SECONDS)))
    return True
