"""The ranks of a node draw a model's initial weights together: each large tensor is drawn once.

What is drawn depends on the seed and the name alone, and comes from the generator of the CPU: that
of a GPU would give other weights on another kind of GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nlscale.cluster.spread import deal
from nlscale.model.init import draw, full_shape, split
from nlscale.parallel.layout import Layout

_LARGE = 1 << 20
"""Elements; drawing fewer takes no longer than sending them."""


def draw_together(named: dict[str, nn.Parameter], seed: int, layout: Layout) -> None:
    """Set parameters to their initial values, the same as `nlscale.model.init.initialize` does.

    Collective over the ranks of a node that hold these stages of the model.

    Args:
        named: this rank's parameters by their names in the whole model, on the layout's device.
        seed: of the run.
        layout: this rank's place.
    """
    tensors, inside = layout.tensor_size, layout.within_node.dp
    sizes = {name: torch.Size(full_shape(p, tensors)).numel() for name, p in named.items()}
    large = {name: size for name, size in sizes.items() if size >= _LARGE}
    dealt = deal(large, tensors * inside.size())
    mine = dealt[inside.rank() * tensors + layout.tensor_rank]
    drawn = {name: _parts(named[name], name, seed, tensors) for name in mine}
    with torch.no_grad():
        for name in sizes.keys() - large.keys():
            named[name].copy_(_parts(named[name], name, seed, tensors)[layout.tensor_rank])
        for rank, names in enumerate(dealt):
            for name in names:
                _send(named[name], drawn.pop(name, None), *divmod(rank, tensors), layout)


def _parts(parameter: nn.Parameter, name: str, seed: int, tensor_size: int) -> list[Tensor]:
    """Those of all tensor-parallel ranks."""
    return split(draw(parameter, name, seed, tensor_size), parameter, tensor_size)


def _send(
    parameter: Any, parts: list[Tensor] | None, data_rank: int, tensor_rank: int, layout: Layout
) -> None:
    """From the rank that has drawn a tensor to the tensor-parallel ranks, and on to their like."""
    mine = torch.empty_like(parameter, dtype=torch.float32)
    inside, group = layout.within_node.dp, layout.tensor_group
    if inside.rank() == data_rank:
        to_send = None
        if parts is not None:
            to_send = [part.to(mine.device).contiguous() for part in parts]
        dist.scatter(mine, to_send, group=group, group_src=tensor_rank)
    dist.broadcast(mine, group=inside, group_src=data_rank)
    parameter.copy_(mine)
