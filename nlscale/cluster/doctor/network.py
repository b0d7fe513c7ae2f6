"""Bandwidth and latency between the ranks, over what training uses: NCCL on GPUs, else gloo."""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from nlscale.cluster.doctor.meeting import Meeting

_TIMEOUT_SECONDS = 30.0  # of connecting, and of one collective
_SIZES = (1 << 16, 1 << 19, 1 << 22, 1 << 25)  # bytes
_GPU_SIZES = (*_SIZES, 1 << 28)
_GROWTH = 8
_MOST_RUNS = 20
_TARGET_SECONDS = 0.4  # of the runs of one size
_LONGEST_SECONDS = 1.5  # a size that would take longer is left out
_SMALL_RUNS = 200
_LINK_BYTES = (1 << 20, 1 << 27)
_LINK_RUNS = 3  # the best counts: a rank that had to wait for a core is no slow network
_LINKS_SECONDS = 10.0  # of all transfers between the first node and another, in one direction


@dataclass(frozen=True)
class AllReduce:
    """All-reduces of several sizes in one group."""

    ranks: int
    seconds: dict[int, float]
    """Median of the runs on the slowest rank, by bytes."""

    @property
    def gbit(self) -> float:
        """Bus bandwidth of the best size, Gbit/s: bytes/seconds x 2(n-1)/n.

        What a ring passes from each rank to the next; where one rank a node takes part, what a
        node sends.
        """
        share = 2 * (self.ranks - 1) / self.ranks
        return max(size * 8 * share / spent / 1e9 for size, spent in self.seconds.items())

    @classmethod
    def from_plain(cls, plain: dict[str, Any] | None) -> AllReduce | None:
        """Back from `dataclasses.asdict` and JSON, which has texts for keys."""
        if plain is None:
            return None
        seconds = {int(size): spent for size, spent in plain["seconds"].items()}
        return cls(plain["ranks"], seconds)


@dataclass(frozen=True)
class Link:
    """A transfer between the first node and another, one rank each."""

    sender: str
    receiver: str
    gbit: float
    """Gbit/s."""


@dataclass(frozen=True)
class Network:
    """What the ranks measured between them, as the first rank puts it together."""

    backend: str
    ranks: int
    trouble: dict[str, str] = field(default_factory=dict)
    """What went wrong, by host; then nothing else is known."""
    latency: float | None = None
    """Of an all-reduce of a few numbers over all ranks, seconds."""
    within: dict[str, AllReduce] = field(default_factory=dict)
    """By host, where a node has several ranks."""
    across: AllReduce | None = None
    """One rank of each node, where there are several nodes."""
    everyone: AllReduce | None = None
    """All ranks, where both nodes and ranks of a node are several."""
    links: tuple[Link, ...] = ()


def backend() -> str:
    """What training would use here."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def measure(meeting: Meeting, nodes: list[list[int]], say: Callable[[str], None]) -> dict[str, Any]:
    """Take part in all measurements; every rank calls it.

    Args:
        meeting: of all ranks.
        nodes: the ranks of each node.
        say: shows progress.

    Returns:
        What this rank measured: `trouble` (text or None), `latency`, `within`, `across`,
        `everyone` (plain `AllReduce` or None) and `links` (Gbit/s sent, by receiving node).
    """
    found: dict[str, Any] = {"trouble": None, "links": {}}
    try:
        with _joined(meeting) as device:
            wire = _Wire(device)
            _measure(wire, meeting, nodes, say, found)
    except (RuntimeError, ValueError) as error:  # all that torch.distributed raises
        found["trouble"] = str(error).partition("\n")[0]
    return found


def assemble(found: dict[int, dict[str, Any]], nodes: list[list[int]], names: list[str]) -> Network:
    """Put together what the ranks measured.

    Args:
        found: what `measure` returned, by rank.
        nodes: the ranks of each node.
        names: of the nodes.
    """
    host = {rank: name for ranks, name in zip(nodes, names, strict=True) for rank in ranks}
    trouble: dict[str, str] = {}
    for rank, seen in found.items():
        if seen["trouble"]:
            trouble.setdefault(host[rank], seen["trouble"])
    if trouble:
        return Network(backend(), len(host), trouble)
    within = {}
    for ranks, name in zip(nodes, names, strict=True):
        of_node = AllReduce.from_plain(found[ranks[0]]["within"])
        if of_node is not None:
            within[name] = of_node
    links = tuple(
        Link(host[rank], names[int(node)], gbit)
        for rank, seen in found.items()
        for node, gbit in seen["links"].items()
    )
    return Network(
        backend=backend(),
        ranks=len(host),
        latency=found[0]["latency"],
        within=within,
        across=AllReduce.from_plain(found[0]["across"]),
        everyone=AllReduce.from_plain(found[0]["everyone"]),
        links=links,
    )


@contextlib.contextmanager
def _joined(meeting: Meeting) -> Any:
    """The process group of all ranks; yields the device of its tensors."""
    here = meeting.place
    device = torch.device("cpu")
    if backend() == "nccl":
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
        # a collective that hangs raises here, instead of ending the process from a thread
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        dist.init_process_group(
            backend(),
            store=dist.PrefixStore("network", meeting.store),
            rank=here.rank,
            world_size=here.world,
            timeout=datetime.timedelta(seconds=min(_TIMEOUT_SECONDS, meeting.patience)),
        )
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _measure(
    wire: _Wire,
    meeting: Meeting,
    nodes: list[list[int]],
    say: Callable[[str], None],
    found: dict[str, Any],
) -> None:
    rank = meeting.place.rank
    several_nodes, several_ranks = len(nodes) > 1, any(len(ranks) > 1 for ranks in nodes)
    leaders = [ranks[0] for ranks in nodes]
    node_group = across_group = None  # all ranks
    if several_nodes and several_ranks:
        # every rank takes part in making every group
        groups = [dist.new_group(ranks) for ranks in nodes]
        node_group = next(g for g, ranks in zip(groups, nodes, strict=True) if rank in ranks)
        across_group = dist.new_group(leaders)
    say("latency")
    found["latency"] = wire.latency()
    found["within"] = found["across"] = found["everyone"] = None
    if several_ranks:
        say("bandwidth within the nodes")
        found["within"] = asdict(wire.all_reduce(node_group))
    if several_nodes and rank in leaders:
        say("bandwidth across the nodes, one rank each")
        found["across"] = asdict(wire.all_reduce(across_group))
    if several_nodes and several_ranks:
        say("bandwidth across the nodes, all ranks")
        found["everyone"] = asdict(wire.all_reduce(None))
    if several_nodes and rank in leaders:
        _links(wire, meeting, leaders, say, found["links"])


def _links(
    wire: _Wire,
    meeting: Meeting,
    leaders: list[int],
    say: Callable[[str], None],
    sent: dict[int, float],
) -> None:
    """The first node with each other one, in both directions, one pair after the other."""
    seconds = min(_TARGET_SECONDS, _LINKS_SECONDS / (len(leaders) - 1))
    rank = meeting.place.rank
    if rank != 0:
        meeting.hear(f"link/{rank}")  # the first node is busy with the others before
        wire.receive(0)
        sent[0] = wire.send(0, seconds)
        return
    for node, leader in enumerate(leaders[1:], 1):
        say(f"link {node} of {len(leaders) - 1} to the first node")
        meeting.say(f"link/{leader}")
        sent[node] = wire.send(leader, seconds)
        wire.receive(leader)


class _Wire:
    """Timed transfers on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sizes = _GPU_SIZES if device.type == "cuda" else _SIZES

    def latency(self) -> float:
        """Seconds of an all-reduce of 64 bytes over all ranks, the median on the slowest rank."""
        few = torch.zeros(8, dtype=torch.float64, device=self._device)
        first = [self._timed(lambda: dist.all_reduce(few)) for _ in range(10)]
        usual = self._slowest(statistics.median(first), None)
        runs = max(10, min(_SMALL_RUNS, int(_TARGET_SECONDS / usual)))
        spent = [self._timed(lambda: dist.all_reduce(few)) for _ in range(runs)]
        return self._slowest(statistics.median(spent), None)

    def all_reduce(self, group: dist.ProcessGroup | None) -> AllReduce:
        """Several sizes in a group, until one takes too long; every rank of the group calls it."""
        spent: dict[int, float] = {}
        self._run(self._sizes[0], group)  # connects
        for size in self._sizes:
            once = self._slowest(self._run(size, group), group)
            runs = max(1, min(_MOST_RUNS, int(_TARGET_SECONDS / once)))
            times = [self._run(size, group) for _ in range(runs)]
            spent[size] = self._slowest(statistics.median(times), group)
            if _GROWTH * spent[size] > _LONGEST_SECONDS:
                break
        return AllReduce(dist.get_world_size(group), spent)

    def send(self, peer: int, seconds: float) -> float:
        """Send to a rank that calls `receive`, for about so many seconds; Gbit/s."""
        least, most = _LINK_BYTES
        self._transfer(peer, least)  # connects
        size = int(least * seconds / _LINK_RUNS / self._transfer(peer, least))
        size = max(least, min(most, size))
        spent = [self._transfer(peer, size, turn == _LINK_RUNS - 1) for turn in range(_LINK_RUNS)]
        return size * 8 / min(spent) / 1e9

    def receive(self, peer: int) -> None:
        """The other end of `send`."""
        more = True
        while more:
            header = torch.zeros(2, dtype=torch.int64, device=self._device)
            dist.recv(header, peer)
            size, more = int(header[0]), not header[1]
            dist.recv(torch.empty(size, dtype=torch.uint8, device=self._device), peer)
            dist.send(header, peer)

    def _transfer(self, peer: int, size: int, last: bool = False) -> float:
        """Seconds until a rank says that it has so many bytes."""
        header = torch.tensor([size, int(last)], device=self._device)
        data = torch.zeros(size, dtype=torch.uint8, device=self._device)
        dist.send(header, peer)

        def there_and_back() -> None:
            dist.send(data, peer)
            dist.recv(header, peer)

        return self._timed(there_and_back)

    def _run(self, size: int, group: dist.ProcessGroup | None) -> float:
        data = torch.zeros(size // 4, device=self._device)
        return self._timed(lambda: dist.all_reduce(data, group=group))

    def _timed(self, work: Callable[[], Any]) -> float:
        self._settle()
        started = time.monotonic()
        work()
        self._settle()
        return time.monotonic() - started

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _slowest(self, seconds: float, group: dist.ProcessGroup | None) -> float:
        """The same on every rank of the group, so that all decide alike."""
        value = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group)
        return float(value)
