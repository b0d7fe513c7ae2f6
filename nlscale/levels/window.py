"""The window gradient of a sync group: summed on the spot, reduced across nodes when due.

One megatron-core `DistributedDataParallel` a sync group, over the data-parallel ranks of a node.
At every step its buffer is reduce-scattered inside the node, and this rank's shard is added to the
window sum; across nodes the sum goes once a period. Because the sums over steps and over replicas
commute (docs/concepts/levels.md) that is the same update as reducing at every step. Sums live
outside `.grad` and outside every norm, and a step is added to them whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.levels.spectrum import SyncGroup
from nlscale.parallel import cpu
from nlscale.parallel.layout import Layout

_ROW = 4096


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
        overlap: bool,
    ) -> None:
        self.group = group
        with cpu.cuda_by_name():
            self.ddp = DistributedDataParallel(
                megatron,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=overlap,
                ),
                ParameterView(parameters),
                pg_collection=layout.within_node,
            )
        inside = layout.within_node.dp
        buckets = {
            (i, bucket.bucket_id): bucket
            for i, buffer in enumerate(self.ddp.buffers)
            for bucket in buffer.buckets
        }
        self.places = list(buckets)
        """Buffer and bucket of each shard."""
        self.shards = [
            shard_buffer(bucket.grad_data, inside.size())[inside.rank()]
            for bucket in buckets.values()
        ]
        """This rank's part of each gradient bucket, fp32."""
        # With a period of one step the gradient of the step is the window.
        self.sums = self.shards if group.period == 1 else [torch.zeros_like(s) for s in self.shards]

    def start_step(self) -> None:
        """Before the first backward pass of a step."""
        self.ddp.zero_grad_buffer()

    def finish_step(self) -> None:
        """After the last backward pass: the step's gradient is summed inside the node."""
        self.ddp.finish_grad_sync()

    def square(self) -> Tensor:
        """Sum of squares of this rank's gradient shard, float64; not finite where it is not."""
        return torch.stack([sum_of_squares(shard) for shard in self.shards]).sum()

    def add_step(self, admitted: Tensor) -> None:
        """Add the step to the window where it is admitted (bool []), on the device.

        With a period of one step it stays in the gradient buffer all the same: then the window
        holds no tokens, and is not applied.
        """
        if self.sums is not self.shards:
            for shard in self.shards:
                shard.masked_fill_(~admitted, 0.0)  # 0 * NaN is NaN
            torch._foreach_add_(self.sums, self.shards)

    def close(self) -> None:
        """Leave the sum of the window's gradients in the gradient buffer.

        The sums must be those of all nodes by now.
        """
        if self.sums is not self.shards:
            torch._foreach_copy_(self.shards, self.sums)
            torch._foreach_zero_(self.sums)

    def scale(self, factor: Tensor) -> None:
        """Multiply the closed window's gradient: the mean over its tokens, clipped."""
        torch._foreach_mul_(self.shards, factor.to(torch.float32))


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


def reduce_across_nodes(layout: Layout, shards: list[Tensor]) -> None:
    """Sum shards over the nodes, in place; all of them are under way at once."""
    if layout.across_nodes is None:
        return
    group = layout.across_nodes
    works = [dist.all_reduce(shard, group=group, async_op=True) for shard in shards]
    for work in works:
        work.wait()
