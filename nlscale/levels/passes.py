"""What updates of whole matrices send and compute, from the configuration alone (no tensors).

Each matrix has one owner among the ranks that hold the optimizer's state of a pipeline stage
(`nlscale.levels.exchange`); its values go there and back as often as the rule says
(`nlscale.optim.table.Rule.on_whole`), in fp32, or in bf16 where the run trains in that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from nlscale.config.level_optimizer import of_level
from nlscale.config.vocabulary import Config, Dtype, Sharding
from nlscale.levels.kept import rules_by_level
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
from nlscale.model.sizes import Shape, level_matrices
from nlscale.optim.table import OnWhole

Shapes = dict[Shape, int]
"""How many of each."""


@dataclass(frozen=True)
class Call:
    """Matrices go to their owners, are orthogonalised there, and come back."""

    kind: OnWhole
    every: int
    """Updates between two of the same block."""

    @property
    def passes(self) -> int:
        """There and back together."""
        return self.kind.given + self.kind.results


@dataclass(frozen=True)
class LevelMatrices:
    """The matrices of a level; none where its rule takes no whole matrices."""

    blocks: tuple[Shapes, ...]
    """Of each block."""
    calls: tuple[Call, ...]
    """Of an update."""
    iterations: int
    """Of Newton-Schulz."""

    @property
    def shapes(self) -> Shapes:
        """Of all blocks together."""
        return _joined(self.blocks)

    @property
    def elements(self) -> float:
        """Of a block, the mean."""
        return self.total / len(self.blocks)

    @property
    def total(self) -> int:
        """Elements of all blocks together."""
        return sum(map(_elements, self.blocks))

    @property
    def turns(self) -> int:
        """Updates after which they repeat."""
        return math.lcm(*(call.every for call in self.calls))

    def elements_of(self, depths: Iterable[int]) -> int:
        """Elements of some blocks."""
        return sum(_elements(self.blocks[depth]) for depth in depths)

    @property
    def passes(self) -> float:
        """There and back together, a mean update."""
        return sum(call.passes / call.every for call in self.calls)

    @property
    def flops(self) -> float:
        """Newton-Schulz of all of a block, the mean, at a mean update."""
        every = sum(self.of_one(shape) * number for shape, number in self.shapes.items())
        return sum(every / len(self.blocks) / call.every for call in self.calls)

    def of_one(self, shape: Shape) -> float:
        """FLOPs of orthogonalising a matrix: three products an iteration, of m x n with m <= n."""
        m, n = sorted(shape)
        return self.iterations * (4.0 * m * m * n + 2.0 * m**3)


@dataclass(frozen=True)
class GroupMatrices:
    """Those of a sync group, in some blocks."""

    group: SyncGroup
    level: LevelMatrices
    depths: list[int]
    layers: int
    """Of the model."""

    def values(self) -> list[int]:
        """Numbers that travel there and back at each of `turns` updates, over all ranks."""
        return [
            sum(call.passes * self.level.elements_of(depths) for call, depths in calls)
            for calls in self.updates()
        ]

    def longest(self, owners: int) -> list[float]:
        """Newton-Schulz FLOPs of the owner with most to do, at each of `turns` updates.

        Args:
            owners: ranks over which the matrices are dealt: the largest first, to the rank with
                least to do.
        """
        dealt = self._dealt(owners)
        return [
            sum(max(map(self._flops, _together(dealt, depths))) for _, depths in calls)
            for calls in self.updates()
        ]

    def owned(self, owners: int, depths: Iterable[int]) -> list[Shapes]:
        """The matrices of some blocks that each owner has; `owners` as of `longest`."""
        return _together(self._dealt(owners), depths)

    def updates(self) -> list[list[tuple[Call, list[int]]]]:
        """The calls of each update, and of which blocks: staggered over depth."""
        return [
            [
                (
                    call,
                    [d for d in self.depths if self._position(update, d, call) == call.every - 1],
                )
                for call in self.level.calls
            ]
            for update in range(self.level.turns)
        ]

    def _position(self, update: int, depth: int, call: Call) -> int:
        return (update + depth * call.every // self.layers) % call.every

    def _flops(self, shapes: Shapes) -> float:
        return sum(self.level.of_one(shape) * number for shape, number in shapes.items())

    def _dealt(self, owners: int) -> list[dict[int, Shapes]]:
        """Of each owner, by depth."""
        loads = [(0, rank) for rank in range(owners)]
        dealt: list[dict[int, Shapes]] = [{} for _ in range(owners)]
        largest_first = sorted(self.level.shapes, key=lambda shape: -_work(shape))
        for shape in largest_first:
            for depth in self.depths:
                for _ in range(self.level.blocks[depth].get(shape, 0)):
                    load, rank = heapq.heappop(loads)
                    heapq.heappush(loads, (load + _work(shape), rank))
                    shapes = dealt[rank].setdefault(depth, {})
                    shapes[shape] = shapes.get(shape, 0) + 1
        return dealt


def matrices_by_level(config: Config) -> list[LevelMatrices]:
    """Those that rules over whole matrices take, fastest level first."""
    found = []
    for index, (own, blocks) in enumerate(
        zip(rules_by_level(config), level_matrices(config), strict=True)
    ):
        section = of_level(config, index)
        calls = tuple(
            Call(call, 1 if call.every is None else attrgetter(call.every)(section))
            for call in own.on_whole
        )
        taken = blocks if own.whole_matrices else [{} for _ in blocks]
        has = any(taken)
        found.append(LevelMatrices(tuple(taken), calls if has else (), section.matrices.iterations))
    return found


def group_matrices(
    config: Config, levels: list[Level], stagger: bool, depths: Iterable[int]
) -> list[GroupMatrices]:
    """Those of each sync group in some blocks, in the order of levels and phases.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        stagger: whether blocks have phases of their own.
        depths: the blocks.
    """
    layers, depths = config.model.layers, list(depths)
    found = []
    for level, own in zip(levels, matrices_by_level(config), strict=True):
        together: dict[SyncGroup, list[int]] = {}
        for depth in depths if own.shapes else []:
            together.setdefault(sync_group(level, depth, layers, stagger), []).append(depth)
        found += [
            GroupMatrices(group, own, mine, layers) for group, mine in sorted(together.items())
        ]
    return found


def value_bytes(config: Config) -> int:
    """Of a number of a matrix on its way."""
    return 2 if config.train.dtype == Dtype.bf16 else 4


def matrix_crossing_bytes(config: Config, values: float, group_nodes: int) -> float:
    """Bytes that leave a node of a data-parallel group, in expectation, when values travel.

    Each node holds an equal part of them, and of that (n - 1) / n belongs elsewhere. None where
    every node has all of the optimizer's state, or a matrix lies whole on one.

    Args:
        config: the run.
        values: numbers, over all ranks, there and back.
        group_nodes: nodes that a data-parallel group spans.
    """
    if config.parallel.shard_optimizer != Sharding.all:
        return 0.0
    return value_bytes(config) * values / group_nodes * (group_nodes - 1) / group_nodes


def _together(dealt: list[dict[int, Shapes]], depths: Iterable[int]) -> list[Shapes]:
    """Of each owner, in some blocks."""
    found: list[Shapes] = [{} for _ in dealt]
    for mine, by_depth in zip(found, dealt, strict=True):
        for depth in depths:
            for shape, number in by_depth.get(depth, {}).items():
                mine[shape] = mine.get(shape, 0) + number
    return found


def _joined(every: Iterable[Shapes]) -> Shapes:
    found: Shapes = {}
    for shapes in every:
        for shape, number in shapes.items():
            found[shape] = found.get(shape, 0) + number
    return found


def _elements(shapes: Shapes) -> int:
    return sum(out * into * number for (out, into), number in shapes.items())


def _work(shape: Shape) -> int:
    """As `nlscale.levels.exchange.Matrix.work` has it."""
    return shape[0] * shape[1] * min(shape)
