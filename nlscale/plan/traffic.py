"""Bytes that leave a node for the others, step by step, from the configuration alone.

Gradients cross in fp32. Each data-parallel rank of a node reduces its shard over the ranks that
hold the same shard on the other nodes, so that together they send what one ring all-reduce over
the nodes would (`nlscale.levels.reduction_bytes`).

A sync group is reduced at the end of its window (MATH 1); plain data parallel, or
`levels.reduction=every-step`, reduces every group at every step. Not counted: the few numbers
that all ranks agree on after a step, what starts and checkpoints a run, and the last step, which
applies every unfinished window. Under tensor parallelism the parameters that each rank holds
whole (norms and biases, below a thousandth) cross once a tensor rank and are counted once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlscale.config import Config, Reduction
from nlscale.levels import Level, SyncGroup, reduction_bytes, sync_group
from nlscale.model.sizes import level_parameters

_LONGEST_SERIES = 1_000_000


@dataclass(frozen=True)
class Traffic:
    """Bytes leaving one node in the steady state."""

    bytes_per_level: NDArray[np.float64]
    """[levels, cycle]: at each step of a cycle, steps counted from 1 (mod cycle)."""
    mean_per_level: NDArray[np.float64]
    """[levels]: a step, exact for any periods."""

    @property
    def per_step(self) -> NDArray[np.float64]:
        """[cycle]: all levels together."""
        return self.bytes_per_level.sum(axis=0)

    @property
    def mean(self) -> float:
        return float(self.mean_per_level.sum())

    @property
    def peak(self) -> float:
        return float(self.per_step.max())

    @property
    def peak_per_level(self) -> NDArray[np.float64]:
        """[levels]: the largest step of each; levels need not peak at the same step."""
        return self.bytes_per_level.max(axis=1)


def traffic(
    config: Config,
    levels: list[Level],
    vocabulary: int,
    nodes: int,
    stagger: bool | None = None,
    reduction: Reduction | None = None,
) -> Traffic:
    """The traffic of a configuration between nodes.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        nodes: nodes that a data-parallel group spans.
        stagger: null: `config.levels.stagger`.
        reduction: null: `config.levels.reduction`.
    """
    stagger = config.levels.stagger if stagger is None else stagger
    reduction = config.levels.reduction if reduction is None else reduction
    steps = cycle_steps(levels)
    series = np.zeros((len(levels), steps))
    means = np.zeros(len(levels))
    for group, parameters in group_parameters(config, levels, vocabulary, stagger).items():
        sent = reduction_bytes(parameters, nodes)
        if reduction == Reduction.every_step:
            first, every = 1, 1
        else:
            first = next(step for step in range(1, group.period + 1) if group.due(step))
            every = group.period
        series[group.level, first - 1 :: every] += sent
        means[group.level] += sent / every
    return Traffic(series, means)


def cycle_steps(levels: list[Level]) -> int:
    """Steps after which the pattern of updates repeats: the longest period where each divides it.

    Periods that hardly divide each other are cut off after about a million steps.
    """
    cycle = math.lcm(*(level.period for level in levels))
    longest = max(level.period for level in levels)
    return cycle if cycle <= _LONGEST_SERIES else -(-_LONGEST_SERIES // longest) * longest


def group_parameters(
    config: Config, levels: list[Level], vocabulary: int, stagger: bool
) -> dict[SyncGroup, int]:
    """Parameters of each sync group, in the order of levels and phases."""
    layers = config.model.layers
    counts: dict[SyncGroup, int] = {}
    for level, depths in zip(levels, _parameters_by_depth(config, vocabulary), strict=True):
        for depth, parameters in enumerate(depths):
            group = sync_group(level, depth, layers, stagger)
            counts[group] = counts.get(group, 0) + parameters
    return dict(sorted(counts.items()))


def _parameters_by_depth(config: Config, vocabulary: int) -> list[list[int]]:
    """[level][depth]; the embedding counts with the first block, last norm and head with the last.

    All blocks are alike, so what a block holds is what `level_parameters` counts for a model
    without vocabulary, less its last norm, divided by the layers.
    """
    layers, width = config.model.layers, config.model.d_model
    blocks = level_parameters(config, vocabulary=0)
    blocks[0] -= width
    table = [[total // layers] * layers for total in blocks]
    table[0][0] += vocabulary * width
    table[0][-1] += vocabulary * width + width
    return table
