"""The window gradient of a sync group: summed on the spot, reduced across nodes when due.

One megatron-core `DistributedDataParallel` a sync group, over the data-parallel ranks of a node.
At every step its buffer is reduce-scattered inside the node, and this rank's shard is added to the
window sum; across nodes the sum goes once a period, with the step that closes the window, bucket by
bucket behind the reduction inside the node. Because the sums over steps and over replicas commute
(docs/concepts/levels.md) that is the same update as reducing at every step. Sums live outside
`.grad` and outside every norm, and a step is added to them whole or not at all: until the verdict
on the closing step is known they are kept beside what has crossed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.vocabulary import Config, Reduction, WireFormat
from nlscale.levels.feedback import Owed, Packed
from nlscale.levels.spectrum import INTEGER_BITS, SyncGroup
from nlscale.levels.wire import Wire
from nlscale.parallel import cpu
from nlscale.parallel.layout import Layout

_ROW = 4096


def bucket_range(bucket: Any, inside: Any) -> tuple[int, int]:
    """Where this data-parallel rank's part of a bucket begins and ends in its buffer."""
    size = bucket.grad_data.numel() // inside.size()
    return bucket.offset + inside.rank() * size, bucket.offset + (inside.rank() + 1) * size


class ParameterView(nn.Module):
    """Some parameters of a model under their own names, as the module that DDP wants to see."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters

    def named_parameters(
        self, *args: object, **kwargs: object
    ) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self._named.items())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self._named.values())


class Window:
    """The gradient of one sync group since its last update."""

    def __init__(
        self,
        group: SyncGroup,
        parameters: dict[str, nn.Parameter],
        megatron: TransformerConfig,
        layout: Layout,
        wire: Wire,
        wire_format: WireFormat,
        config: Config,
    ) -> None:
        self.group, self._wire, self._format = group, wire, wire_format
        self.parameters = list(parameters.values())
        self._every_step = config.levels.reduction == Reduction.every_step
        self.local = config.levels.spectrum[group.level].local
        """Whether gradients stay on this node, and only what updates have made crosses."""
        rounds = wire.joins_nodes and wire_format in INTEGER_BITS
        parts = _parts(parameters, apart=rounds and layout.tensor_size > 1)
        self.ddps = [_ddp(part, megatron, layout, config) for part in parts]
        inside = layout.within_node.dp
        buffers = [buffer for ddp in self.ddps for buffer in ddp.buffers]
        buckets = {
            (i, bucket.bucket_id): bucket
            for i, buffer in enumerate(buffers)
            for bucket in buffer.buckets
        }
        self.places = list(buckets)
        """Buffer and bucket of each shard."""
        self.shards = [
            shard_buffer(bucket.grad_data, inside.size())[inside.rank()]
            for bucket in buckets.values()
        ]
        """This rank's part of each gradient bucket, fp32."""
        self.cuts = [
            wire.cut(buffers[i], bucket, *bucket_range(bucket, inside))
            for (i, _), bucket in buckets.items()
        ]
        """Of each shard."""
        self._owned = [
            shard[each]
            for shard, cut in zip(self.shards, self.cuts, strict=True)
            for each in wire.owned(cut, shard.numel())
        ]
        """What of these this rank updates parameters by."""
        # With a period of one step the gradient of the step is the window.
        self.sums = self.shards if group.period == 1 else [torch.zeros_like(s) for s in self.shards]
        self.before_crossing: Callable[[int], None] | None = None
        """Called with the place of a shard that this node has summed, before others join it."""
        self.owed: Owed | None = None
        """What is still to be sent of steps that are over; None: nothing ever is."""
        self._packed: list[Packed | None] = [None] * len(self.shards)
        if rounds:
            owed = self.begin_owed()
            self._packed = [
                wire.packed(owed, i, wire_format, cut, config.train.kernels)
                for i, cut in enumerate(self.cuts)
            ]
        self._closes = self._crosses = self._unsettled = False
        self._sent: set[int] = set()
        if config.parallel.overlap:
            groups = {
                p: group for ddp in self.ddps for p, group in ddp.param_to_bucket_group.items()
            }
            for i, bucket in enumerate(buckets.values()):
                if not any(map(_is_partial, bucket.params_list)):
                    self._send_behind(groups[bucket.params_list[0]], i)

    def start_step(self, closes: bool, apart: bool = False) -> None:
        """Before the first backward pass of a step, at the end of which the window may close.

        `apart`: of a pass that is no step, between two of them: nothing is to cross.
        """
        self._closes = closes
        joins = self._wire.joins_nodes and not self.local and not apart
        self._crosses = joins and (closes or self._every_step)
        self._unsettled = self._crosses
        self._sent.clear()
        self.clear()

    def clear(self) -> None:
        """Set the gradient buffers to zero."""
        for ddp in self.ddps:
            ddp.zero_grad_buffer()

    def finish_step(self) -> None:
        """After the last backward pass: the step's gradient is summed inside the node."""
        for ddp in self.ddps:
            ddp.finish_grad_sync()

    def send_rest(self) -> None:
        """Start the sums over nodes that did not start during the backward pass."""
        if self._crosses:
            for i in range(len(self.shards)):
                if i not in self._sent:
                    self._send(i)

    def begin_owed(self) -> Owed:
        """Make room for what the window owes, where there is none yet."""
        if self.owed is None:
            self.owed = self._wire.owed(self.shards, self._format)
        return self.owed

    def settle(self, accepted: Tensor) -> None:
        """Once what has crossed is known to be of use, or not, keep what that leaves to be sent.

        Args:
            accepted: whether an update or the window's sum takes it in; bool [].
        """
        if self.owed is not None and self._unsettled:
            self.owed.settle(accepted)
        self._unsettled = False

    def square(self) -> Tensor:
        """Sum of squares of the closed window's gradient, as far as this rank has it, float64."""
        if not self._owned:  # all of its shards are of matrices that lie on other nodes
            return torch.zeros((), dtype=torch.float64, device=self.shards[0].device)
        return torch.stack([sum_of_squares(owned) for owned in self._owned]).sum()

    def forget_of_others(self) -> None:
        """Set to zero, of the window's sums, what this rank does not update parameters by."""
        for held, cut in zip(self.sums, self.cuts, strict=True):
            own = self._wire.owned(cut, held.numel())
            mine = [held[each].clone() for each in own]
            held.zero_()
            for each, values in zip(own, mine, strict=True):
                held[each].copy_(values)

    def close_without_step(self) -> None:
        """Leave in the gradient buffer what the window holds, summed over the nodes, and empty it.

        For a window that was to close with a step that was not admitted (else `take_step` closes
        it). The sum over nodes is there when the wire has finished.
        """
        torch._foreach_copy_(self.shards, self.sums)
        torch._foreach_zero_(self.sums)
        if not self.local and not (self._wire.joins_nodes and self._every_step):
            self.cross()

    def cross(self) -> None:
        """Start to sum over the nodes what is in the gradient buffers, no backward pass going on.

        It is there when the wire has finished. On one node only what it owes is added.
        """
        if not self._wire.joins_nodes:
            self._add_owed()
            return
        self._unsettled = True
        for i in range(len(self.shards)):
            self._start(i, ())

    def scale(self, factor: Tensor) -> None:
        """Multiply the closed window's gradient: the mean over its tokens, clipped."""
        if self._owned:
            torch._foreach_mul_(self._owned, factor.to(torch.float32))

    @property
    def _waits(self) -> bool:
        """Whether steps are added up apart from the gradient buffer, until the window closes."""
        return self.sums is not self.shards

    @property
    def _joins_before_crossing(self) -> bool:
        """Whether this node's earlier steps cross with the one at which the window closes."""
        return self._closes and self._crosses and not self._every_step and self._waits

    def _send_behind(self, bucket_group: Any, i: int) -> None:
        """Let the sum of a shard over the nodes follow that of its bucket inside the node.

        megatron-core starts the latter in the last backward pass, as soon as all gradients of the
        bucket are there; in the first step, where it does not know how many there will be, after
        it.
        """
        start = bucket_group.start_grad_sync

        def start_both(*args: Any, **kwargs: Any) -> None:
            start(*args, **kwargs)
            if self._crosses:
                if not self.shards[i].is_cuda:
                    bucket_group.grad_reduce_handle = _Once(bucket_group.grad_reduce_handle)
                self._send(i, bucket_group.grad_reduce_handle.wait)

        bucket_group.start_grad_sync = start_both

    def _send(self, i: int, reduced: Callable[[], object] | None = None) -> None:
        """Sum a shard over the nodes once it is reduced inside this one."""
        self._sent.add(i)
        shard, seen = self.shards[i], self.before_crossing
        first: list[Callable[[], object]] = [] if reduced is None else [reduced]
        if seen is not None:
            first.append(lambda: seen(i))
        if self._joins_before_crossing:
            first.append(lambda: shard.add_(self.sums[i]))
        self._start(i, first)

    def _start(self, i: int, first: Iterable[Callable[[], object]]) -> None:
        """Sum a shard over the nodes, when something has been done first."""
        shard, owed, packed = self.shards[i], self.owed, self._packed[i]
        before = [*first]
        if owed is not None and packed is None:
            before.append(lambda: owed.add_to(shard, i))

        def all_before() -> None:
            for do in before:
                do()

        self._wire.start(shard, self._format, all_before, self.cuts[i], packed)

    def _add_owed(self) -> None:
        """On one node, where nothing crosses, close the window with what others have left."""
        if self.owed is not None:
            self._unsettled = True
            for i, shard in enumerate(self.shards):
                self.owed.add_to(shard, i)


def _ddp(
    parameters: dict[str, nn.Parameter],
    megatron: TransformerConfig,
    layout: Layout,
    config: Config,
) -> DistributedDataParallel:
    with cpu.cuda_by_name():
        ddp = DistributedDataParallel(
            megatron,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=config.parallel.overlap,
                bucket_size=config.parallel.bucket_size,
            ),
            ParameterView(parameters),
            pg_collection=_as_first_stage(layout.within_node),
        )
    if layout.within_node.dp.size() == 1:
        for bucket_group in ddp.bucket_groups:
            _reduce_nothing(bucket_group)
    return ddp


def _parts(parameters: dict[str, nn.Parameter], apart: bool) -> list[dict[str, nn.Parameter]]:
    """Parameters whose gradients cross as they are, and those that tensor ranks add up before.

    In a buffer of their own the latter, gains of norms for the most part, hold up no others.

    Args:
        parameters: by name.
        apart: whether what all tensor ranks hold alike is to share no scale with what is split over
            them, by which it would come out of the wire different on each.
    """
    partial = {name: p for name, p in parameters.items() if _is_partial(p)}
    alike = {n: p for n, p in parameters.items() if apart and n not in partial and _is_alike(p)}
    rest = {n: p for n, p in parameters.items() if n not in partial and n not in alike}
    return [part for part in (rest, alike, partial) if part]


def _reduce_nothing(bucket_group: Any) -> None:
    """Where a node has one data-parallel rank, let its gradients stay where they are: the sum of
    one would be copied there and back."""
    assert all(bucket.gradient_scaling_factor == 1.0 for bucket in bucket_group.buckets)

    def start(*args: Any, **kwargs: Any) -> None:
        bucket_group.grad_reduce_handle = _Reduced()

    bucket_group.start_grad_sync = start


class _Reduced:
    """A reduction that is over."""

    def wait(self) -> None: ...


class _Once:
    """A reduction by gloo for which two threads wait: it copies its result at each call of wait."""

    def __init__(self, reduction: Any) -> None:
        self._reduction, self._lock = reduction, threading.Lock()

    def wait(self) -> None:
        with self._lock:
            if self._reduction is not None:
                self._reduction.wait()
                self._reduction = None


class _FirstStage:
    """In place of the group of pipeline ranks: of all stages the first."""

    @staticmethod
    def rank() -> int:
        return 0


def _as_first_stage(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The groups for a DDP that is to have buckets on every pipeline stage.

    megatron-core has them on the first alone, as its reductions end last; those between nodes can
    end last on any.
    """
    groups = copy.copy(groups)
    groups.pp = _FirstStage()
    return groups


def _is_partial(parameter: Any) -> bool:
    return parameter.partial_gradient


def _is_alike(parameter: Any) -> bool:
    return not parameter.tensor_model_parallel


def take_step(windows: list[Window], admitted: Tensor, counts: Tensor) -> None:
    """Take a step into the windows where it is admitted (bool []), and close those due with it.

    All on the device, when what crosses at this step has crossed. A window that closes leaves its
    gradient in the buffer. Of a step that is not admitted nothing remains but what is in the
    buffers, and the windows stay as they were; what one has sent that closes is yet to be settled.

    Args:
        windows: of a rank.
        admitted: bool [].
        counts: whether it is, and some target of it counts; bool [].
    """
    waiting = [w for w in windows if w._waits]
    growing = [w for w in waiting if not w._closes]
    dropped, adds_nothing = ~admitted, ~counts
    for w in growing:
        for shard in w.shards:
            # 0 * NaN is NaN. What is owed crosses at every step, too; in a window in which no
            # target counts it would be lost.
            shard.masked_fill_(dropped if w.owed is None else adds_nothing, 0.0)
        w.settle(counts)
    for w in windows:
        if w._closes and not w._crosses and not w.local:
            w._add_owed()
    _add(_all(w.sums for w in growing), _all(w.shards for w in growing))
    closing = [w for w in waiting if w._closes]
    alone = [w for w in closing if not w._joins_before_crossing]
    _add(_all(w.shards for w in alone), _all(w.sums for w in alone))
    for held in _all(w.sums for w in closing):
        held.masked_fill_(admitted, 0.0)


def shard_norms(windows: list[Window]) -> list[Tensor]:
    """Of every gradient shard, fp32 []; not finite, too, where the norm is beyond fp32."""
    return list(torch._foreach_norm(_all(w.shards for w in windows)))


def _all(lists: Iterable[list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def _add(to: list[Tensor], tensors: list[Tensor]) -> None:
    if to:
        torch._foreach_add_(to, tensors)


def sum_of_squares(flat: Tensor) -> Tensor:
    """Of an fp32 vector, as float64; infinite where a square is beyond fp32.

    A single fp32 sum over millions of elements is wrong in the fifth digit, and differently for
    each way of sharding them, which clipping would pass on to every weight. Rows are short enough
    for fp32; float64 throughout is ten times slower on a CPU.
    """
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    return rows.square().sum() + rest.square()
