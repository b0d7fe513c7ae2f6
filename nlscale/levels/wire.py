"""What crosses between the nodes: gradients do here, and nowhere else.

A shard is summed over the ranks that hold the same one on each node. Any number of such sums are
started, one after the other, and run beside what the caller does next: on a GPU on a stream of
their own, on a CPU in a thread, as gloo has no order of its own between what waits and what
follows. All ranks of a group start the same ones in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from nlscale.config.vocabulary import WireFormat
from nlscale.levels.spectrum import BF16_AT_ONCE, reduction_bytes
from nlscale.ops.moments import Moment, now, seconds_between
from nlscale.parallel.layout import Layout


class Wire:
    """The sums over nodes that a rank takes part in."""

    def __init__(self, layout: Layout) -> None:
        self._group, self._nodes = layout.across_nodes, layout.nodes
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
    ) -> None:
        """Begin to sum a shard over the nodes, in place; it is the caller's again after `finish`.

        Args:
            shard: fp32, contiguous.
            wire: how it crosses.
            before: what is to be done first, on the same stream or thread: wait for the shard, or
                add to it.
        """
        group = self._group
        assert group is not None and self._beside is not None, "there are no other nodes"
        self.bytes += reduction_bytes(shard.numel(), self._nodes, wire)

        def work() -> None:
            if before is not None:
                before()
            _SUMS[wire](shard, group)

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
        """Sum these now."""
        if self._beside is not None:
            for shard in shards:
                self.start(shard)
            self.finish()


def _sum_as_it_is(shard: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(shard, group=group)


def _sum_in_bf16(shard: Tensor, group: dist.ProcessGroup) -> None:
    """To the node that adds it up, in fp32, and from there to all: the same bits on every node."""
    for piece in shard.split(_PIECE):
        _sum_piece_in_bf16(piece, group)


def _sum_piece_in_bf16(shard: Tensor, group: dist.ProcessGroup) -> None:
    nodes = group.size()
    part = -(-shard.numel() // nodes)
    sent = torch.zeros(nodes * part, dtype=torch.bfloat16, device=shard.device)
    sent[: shard.numel()].copy_(shard)
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(_bytes(arrived), _bytes(sent), group=group)
    mine = arrived.view(nodes, part).float().sum(dim=0).bfloat16()
    dist.all_gather_into_tensor(_bytes(sent), _bytes(mine), group=group)
    shard.copy_(sent[: shard.numel()])


def _bytes(values: Tensor) -> Tensor:
    """The same memory as what every backend can send."""
    return values.view(torch.uint8)


_SUMS = {WireFormat.fp32: _sum_as_it_is, WireFormat.bf16: _sum_in_bf16}


_PIECE = BF16_AT_ONCE // 8
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
