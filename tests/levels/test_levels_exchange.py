"""Ranges of matrices become whole at one rank, and come back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import world
from torch import Tensor

from nlscale.levels.exchange import MatrixExchange, MatrixRange
from nlscale.model.init import constant, split, tag

SHAPES: dict[str, tuple[list[int], int | None, list[int]]] = {
    "sections": ([24, 6], 0, [8, 12, 4]),  # full shape, the dimension that is split, sections
    "columns": ([6, 8], 1, []),
    "heads": ([4, 5, 3], 0, []),
    "copied": ([5, 7], None, []),
}
DEPTHS = {"sections": 0, "columns": 1, "heads": 1, "copied": 2}
TENSOR, DATA = 2, 2


def full(name: str) -> Tensor:
    shape = SHAPES[name][0]
    start = 1000.0 * list(SHAPES).index(name)
    return start + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def wholes(name: str) -> list[Tensor]:
    """The matrices of a parameter."""
    sections = SHAPES[name][2]
    return (
        list(full(name))
        if name == "heads"
        else list(full(name).split(sections or [len(full(name))]))
    )


def part(name: str, tensor_rank: int) -> Any:
    """A tensor rank's part of a parameter, tagged."""
    shape, dim, sections = SHAPES[name]
    carrier: Any = torch.nn.Parameter(torch.empty(shape))
    tag(carrier, constant(0.0), dim, sections, matrix=True)
    mine: Any = torch.nn.Parameter(split(full(name), carrier, TENSOR)[tensor_rank].contiguous())
    tag(mine, constant(0.0), dim, sections, matrix=True)
    return mine


def exchanged(cuts: dict[str, float]) -> dict[str, Any]:
    """On a rank: what whole matrices it saw, and what came back.

    Args:
        cuts: of each parameter, the share of its flattened part that the first data rank has.
    """
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    tensor_rank, data_rank = rank % TENSOR, rank // TENSOR
    parameters = {name: part(name, tensor_rank) for name in SHAPES}
    ranges = []
    for name, p in parameters.items():
        cut = round(cuts[name] * p.numel())
        start, end = ((0, cut), (cut, p.numel()))[data_rank]
        if start < end:
            ranges.append(MatrixRange(name, start, p.detach().flatten()[start:end].clone()))
    exchange = MatrixExchange(
        parameters, DEPTHS, ranges, group, (tensor_rank, TENSOR), torch.float32
    )
    seen: list[Tensor] = []

    def look(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.equal(2 * x, y)
        seen.extend(x)
        return x + 0.5, -y

    doubled = [2 * own.values for own in ranges]
    values = [own.values for own in ranges]
    plus, minus = exchange.on_whole([values, doubled], look, results=2)
    (some,) = exchange.on_whole([values], lambda x: (x,), depths=[1])
    means = exchange.of_matrix(values, lambda mean: mean.rsqrt())
    dist.destroy_process_group()
    return {
        "seen": [x.tolist() for x in seen],
        "ranges": [(own.name, own.start, own.values) for own in ranges],
        "plus": plus, "minus": minus, "some": some, "means": means, "tensor_rank": tensor_rank,
    }  # fmt: skip


def test_each_matrix_is_whole_at_one_rank_and_comes_back() -> None:
    cuts = {"sections": 0.4, "columns": 0.1, "heads": 1.0, "copied": 0.6}
    results = world.run(TENSOR * DATA, exchanged, cuts)
    seen = sorted(matrix for result in results for matrix in result["seen"])
    assert seen == sorted(m.tolist() for name in SHAPES for m in wholes(name))
    assert sum(bool(result["seen"]) for result in results) == TENSOR * DATA, "work is shared out"
    scale = {name: [m.square().mean().rsqrt() for m in wholes(name)] for name in SHAPES}
    for result in results:
        found = zip(*(result[k] for k in ("ranges", "plus", "minus", "some", "means")), strict=True)
        for (name, start, values), plus, minus, some, means in found:
            assert torch.equal(plus, values + 0.5)
            assert torch.equal(minus, -2 * values)
            assert torch.equal(some, values if DEPTHS[name] == 1 else torch.zeros_like(values))
            scaled: Any = torch.nn.Parameter(_scaled(name, scale[name]))
            tag(scaled, constant(0.0), SHAPES[name][1], SHAPES[name][2])
            mine = split(scaled.detach(), scaled, TENSOR)[result["tensor_rank"]].flatten()
            torch.testing.assert_close(means, mine[start : start + len(values)], rtol=1e-6, atol=0)


def _scaled(name: str, factors: list[Tensor]) -> Tensor:
    matrices = [m * f for m, f in zip(wholes(name), factors, strict=True)]
    return torch.stack(matrices) if name == "heads" else torch.cat(matrices)
