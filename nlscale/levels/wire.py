"""What crosses between the nodes: gradients do here, and nowhere else.

A shard is summed over the ranks that hold the same one on each node. Where the state that it
updates is spread over the nodes (`parallel.shard_optimizer`) each of them gets its part of the
sums, and later the others' parts of the updated parameters: an equal part, or what lies on it
(`nlscale.levels.homes`). Any number of such sums are
started, one after the other, and run beside what the caller does next: on a GPU on a stream of
their own, on a CPU in a thread, as gloo has no order of its own between what waits and what
follows. All ranks of a group start the same ones in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.vocabulary import WireFormat
from nlscale.levels.feedback import Owed, Packed
from nlscale.levels.homes import Cut, Homes, cut_at_homes, even_cut
from nlscale.levels.spectrum import INTEGER_BITS, ROUNDED_AT_ONCE, reduction_bytes, sent_bytes
from nlscale.ops.moments import Moment, now, seconds_between
from nlscale.parallel.layout import Layout


class Wire:
    """The sums over nodes that a rank takes part in.

    Args:
        layout: this rank's place.
        gathered: bytes of a parameter that the nodes gather after they have updated their parts
            (`nlscale.levels.spectrum.gathered_bytes`); None: every node gets all sums.
        homes: which node has which parameter; None: they have equal parts of every shard.
    """

    def __init__(
        self, layout: Layout, gathered: int | None = None, homes: Homes | None = None
    ) -> None:
        self._homes = homes
        self._group, self._nodes = layout.across_nodes, layout.nodes
        self._node, self._gathered = layout.node_rank, gathered
        self._device = layout.device
        self._beside: _Stream | _Thread | None = None
        if self._group is not None:
            self._beside = _Stream() if layout.device.type == "cuda" else _Thread()
        self.bytes = 0.0
        """That this rank has sent to other nodes, as far as payload goes."""

    @property
    def joins_nodes(self) -> bool:
        """Whether there are others; if not, a shard is whole as it is."""
        return self._group is not None

    def start(
        self,
        shard: Tensor,
        wire: WireFormat = WireFormat.fp32,
        before: Callable[[], None] | None = None,
        cut: Cut | None = None,
        packed: Packed | None = None,
    ) -> None:
        """Begin to sum a shard over the nodes, in place; it is the caller's again after `finish`.

        What is not `part` of it is then anything finite, if the shards were.

        Args:
            shard: fp32, contiguous.
            wire: how it crosses.
            before: what is to be done first, on the same stream or thread: wait for the shard, or
                add to it.
            cut: of the shard (`cut`).
            packed: of a shard that crosses as integers (`packed`).
        """
        group = self._group
        assert group is not None and self._beside is not None, "there are no other nodes"
        scatters = self._gathered is not None
        crosses = shard.numel() * (self._nodes - 1) / self._nodes
        if cut is not None:
            crosses = shard.numel() - self._mine(cut)
        if packed is not None:
            self.bytes += packed.bytes
        else:
            self.bytes += crosses * sent_bytes(wire, 0 if scatters else None)

        def work() -> None:
            if before is not None:
                before()
            if packed is not None:
                packed.sum(shard, group)
            elif cut is None:
                _SUMS[wire, scatters](shard, group)
            else:
                _SUMS_AT_HOME[wire](shard, cut, group)

        self._beside.run(work)

    def finish(self) -> Waited:
        """What comes next on this thread, and on its stream, finds all the sums.

        Raises:
            RuntimeError: a rank of another node is gone, or anything else that has failed.
        """
        began = now(self._device)
        if self._beside is not None:
            self._beside.join()
        return Waited(began, now(self._device))

    def sum(self, shards: list[Tensor]) -> None:
        """Sum these now, whole, on every node."""
        if self._group is not None:
            for shard in shards:
                self.bytes += reduction_bytes(shard.numel(), self._nodes)
                _sum_as_it_is(shard, self._group)

    @property
    def part(self) -> tuple[int, int]:
        """Which part of how many this node has of each shard (`part_of`)."""
        return (0, 1) if self._gathered is None else (self._node, self._nodes)

    def cut(self, buffer: Any, bucket: Any, begin: int, end: int) -> Cut | None:
        """What each node has of a range of a bucket; None: parts that follow from its length.

        Args:
            buffer: megatron-core's.
            bucket: of it.
            begin: of the range, in the buffer.
            end: of it.
        """
        if self._homes is None:
            return None
        places = sorted((*buffer.param_index_map[p][:2], self._homes.get(p))
                        for p in bucket.params_list)  # fmt: skip
        return cut_at_homes(places, begin, end, self._nodes)

    def owned(self, cut: Cut | None, length: int) -> list[slice]:
        """What this node has of a shard of a length."""
        return [slice(*part_range(length, *self.part))] if cut is None else cut[self._node]

    def owed(self, shards: list[Tensor], wire: WireFormat) -> Owed:
        """What a window may owe; nothing yet.

        Args:
            shards: of the window.
            wire: how it crosses.
        """
        owned = None
        if self._gathered is None and self.joins_nodes:
            owned = [part_range(s.numel(), self._node, self._nodes) for s in shards]
        return Owed(shards, owned, rounds=self.joins_nodes and wire in INTEGER_BITS)

    def packed(
        self, owed: Owed, i: int, wire: WireFormat, cut: Cut | None, kernels: bool = True
    ) -> Packed:
        """How a shard crosses as integers.

        Args:
            owed: of its window.
            i: which of its shards it is.
            wire: how it crosses.
            cut: of the shard (`cut`).
            kernels: whether those for GPUs may be used.
        """
        even = even_cut(owed.errors[i].numel(), self._nodes)
        parts, bits = even if cut is None else cut, INTEGER_BITS[wire]
        return Packed(parts, self._node, bits, owed, i, kernels)

    def at_home(self, parameter: Any) -> bool:
        """Whether this node has of a parameter what its ranks update: but for cut ones, all."""
        return self._homes is None or self._homes.get(parameter, self._node) == self._node

    def _mine(self, cut: Cut) -> int:
        return sum(each.stop - each.start for each in cut[self._node])

    def gather(self, shards: list[Tensor], cuts: Sequence[Cut | None]) -> None:
        """Fill in the parts of these that the other nodes have, in place, now."""
        if self._gathered is None or self._group is None:
            return
        for shard, cut in zip(shards, cuts, strict=True):
            if cut is not None:
                self.bytes += (self._nodes - 1) * self._mine(cut) * shard.itemsize
                for node, slices in enumerate(cut):
                    for each in slices:
                        dist.broadcast(_bytes(shard[each]), group=self._group, group_src=node)
                continue
            self.bytes += (self._nodes - 1) / self._nodes * shard.nbytes
            even = shard.numel() // self._nodes * self._nodes
            if even:
                mine = part_of(shard[:even], *self.part)
                dist.all_gather_into_tensor(_bytes(shard[:even]), _bytes(mine), group=self._group)
            if even < shard.numel():
                dist.broadcast(_bytes(shard[even:]), group=self._group, group_src=self._nodes - 1)


def part_range(length: int, part: int, parts: int) -> tuple[int, int]:
    """Where one of equal parts of so many elements begins and ends; the last has what is over."""
    size = length // parts
    return part * size, (part + 1) * size if part < parts - 1 else length


def part_of(shard: Tensor, part: int, parts: int) -> Tensor:
    """That part of a flat tensor, a view."""
    return shard[slice(*part_range(shard.numel(), part, parts))]


def _sum_as_it_is(shard: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(shard, group=group)


def _scatter_as_it_is(shard: Tensor, group: dist.ProcessGroup) -> None:
    nodes = group.size()
    even = shard.numel() // nodes * nodes
    if even:
        mine = part_of(shard[:even], group.rank(), nodes)
        dist.reduce_scatter_tensor(mine, shard[:even], group=group)
    if even < shard.numel():
        dist.all_reduce(shard[even:], group=group)


def _sum_in_bf16(shard: Tensor, group: dist.ProcessGroup) -> None:
    """To the node that adds it up, in fp32, and from there to all: the same bits on every node."""
    for piece in shard.split(_PIECE):
        nodes = group.size()
        part = -(-piece.numel() // nodes)
        sent = torch.zeros(nodes * part, dtype=torch.bfloat16, device=piece.device)
        sent[: piece.numel()].copy_(piece)
        mine = _added_up(sent, group).bfloat16()
        dist.all_gather_into_tensor(_bytes(sent), _bytes(mine), group=group)
        piece.copy_(sent[: piece.numel()])


def _scatter_in_bf16(shard: Tensor, group: dist.ProcessGroup) -> None:
    """To the node that adds it up, in fp32, and that keeps the sum."""
    nodes = group.size()
    parts = [part_of(shard, part, nodes) for part in range(nodes)]
    longest, most = parts[-1].numel(), max(1, _PIECE // nodes)
    for first in range(0, longest, most):
        size = min(most, longest - first)
        sent = torch.zeros(nodes, size, dtype=torch.bfloat16, device=shard.device)
        for row, part in zip(sent, parts, strict=True):
            piece = part[first : first + size]
            row[: piece.numel()].copy_(piece)
        mine = parts[group.rank()][first : first + size]
        mine.copy_(_added_up(sent.view(-1), group)[: mine.numel()])


def _reduce_as_it_is(shard: Tensor, cut: Cut, group: dist.ProcessGroup) -> None:
    """To the node that has it; elsewhere the shard is then anything finite."""
    for node, slices in enumerate(cut):
        for each in slices:
            dist.reduce(shard[each], group_dst=node, group=group)


def _reduce_in_bf16(shard: Tensor, cut: Cut, group: dist.ProcessGroup) -> None:
    """To the node that has it, which adds up in fp32."""
    nodes, mine = group.size(), group.rank()
    for node, slices in enumerate(cut):
        for piece in (p for each in slices for p in shard[each].split(_PIECE)):
            sent, here = piece.bfloat16(), node == mine
            arrived = sent.new_empty(nodes * piece.numel() if here else 0)
            dist.all_to_all_single(
                _bytes(arrived),
                _bytes(sent),
                [2 * piece.numel() * here] * nodes,
                [2 * piece.numel() * (other == node) for other in range(nodes)],
                group=group,
            )
            if here:
                piece.copy_(arrived.view(nodes, -1).float().sum(dim=0))


def _added_up(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the nodes of the part of this one, fp32; of each node's parts in order, bf16."""
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(arrived), _bytes(sent), group=group)
    return arrived.view(group.size(), -1).float().sum(dim=0)


def _bytes(values: Tensor) -> Tensor:
    """The same memory as what every backend can send."""
    return values.view(torch.uint8)


_SUMS = {
    (WireFormat.fp32, False): _sum_as_it_is,
    (WireFormat.bf16, False): _sum_in_bf16,
    (WireFormat.fp32, True): _scatter_as_it_is,
    (WireFormat.bf16, True): _scatter_in_bf16,
}
"""By format, and whether each node is to have its part alone."""

_SUMS_AT_HOME = {WireFormat.fp32: _reduce_as_it_is, WireFormat.bf16: _reduce_in_bf16}
"""By format, of a shard that is cut."""

_PIECE = ROUNDED_AT_ONCE // 8
"""Elements, of which each takes 2 bytes to send, 2 that arrive and 4 to add up."""


class Waited:
    """How long what computes had to wait for the link."""

    def __init__(self, began: Moment, ended: Moment) -> None:
        self._began, self._ended = began, ended

    def seconds(self) -> float:
        """On a GPU: to be asked for when it has come that far, else the host waits for it."""
        return seconds_between(self._began, self._ended)


class _Stream:
    """Work on a stream of its own; the host only asks for it."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def run(self, work: Callable[[], None]) -> None:
        # What the work reads was asked for on the current stream, now or before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)


class _Thread:
    """Work in a thread, in order; it ends with this object, or with the process."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self._running: list[Future[None]] = []
        thread = threading.Thread(target=_work, args=(self._queue,), name="wire", daemon=True)
        thread.start()

    def run(self, work: Callable[[], None]) -> None:
        future: Future[None] = Future()
        self._running.append(future)
        self._queue.put((work, future))

    def join(self) -> None:
        running, self._running = self._running, []
        for future in running:
            future.result()

    def __del__(self) -> None:
        self._queue.put(None)


def _work(queue: SimpleQueue[tuple[Callable[[], None], Future[None]] | None]) -> None:
    """Do what comes until None does. Once something has failed, the rest fails for that reason."""
    failed: BaseException | None = None
    with torch.no_grad():
        while (found := queue.get()) is not None:
            work, future = found
            try:
                if failed is not None:
                    raise failed
                work()
            except BaseException as error:
                failed = error
                future.set_exception(error)
            else:
                future.set_result(None)
            del work, future, found
