"""Where the stack of blocks is cut into pipeline stages, from the configuration alone."""

from __future__ import annotations

import itertools
import math

from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.model.sizes import block_parameters

EMBEDDING_COST = 0.5
"""Of an embedding row beside a row of the head **[choice]**: a lookup needs no arithmetic, but its
gradient and optimizer state take the same memory."""


def stage_blocks(config: Config, vocabulary: int) -> list[range]:
    """The blocks of each model stage, first stage first.

    Stage s lives on pipeline rank s mod `parallel.pipeline`. Without `parallel.stages` the cost of
    the costliest stage is the least possible, where a weight of a block or of the head costs 1.

    Raises:
        UserError: fewer blocks than stages, or `parallel.stages` that do not fit.
    """
    parallel, layers = config.parallel, config.model.layers
    count = parallel.pipeline * parallel.virtual_stages
    where = f"parallel.pipeline {parallel.pipeline} x parallel.virtual_stages"
    if layers < count:
        raise UserError(
            f"model.layers {layers} are fewer than the {count} stages of {where} "
            f"{parallel.virtual_stages}; use at least {count} layers or fewer stages"
        )
    sizes = parallel.stages
    if sizes is None:
        sizes = [layers] if count == 1 else _balanced(config, vocabulary, count)
    if len(sizes) != count or sum(sizes) != layers or min(sizes) < 1:
        raise UserError(
            f"parallel.stages {list(sizes)} must be {count} numbers ({where} "
            f"{parallel.virtual_stages}), each at least 1, with sum {layers} (model.layers); "
            f"leave it null to have them chosen"
        )
    starts = [sum(sizes[:i]) for i in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def stage_costs(config: Config, vocabulary: int, stages: list[range]) -> list[float]:
    """Cost of each model stage: its parameters, those of the embedding by their own weight."""
    blocks, table = block_parameters(config), vocabulary * config.model.d_model
    costs = [sum(blocks[depth] for depth in stage) for stage in stages]
    costs[0] += EMBEDDING_COST * table
    costs[-1] += table
    return costs


def _balanced(config: Config, vocabulary: int, count: int) -> list[int]:
    """One block to each stage, then each further one to the stage that is cheapest with it; where
    blocks differ, the cut of the least cost."""
    blocks = block_parameters(config)
    if len(set(blocks[:-1])) > 1 or not math.isclose(blocks[0], blocks[-1]):
        return _least(config, vocabulary, count)
    head = vocabulary * config.model.d_model / blocks[0]
    costs = [1.0] * count
    costs[0] += EMBEDDING_COST * head
    costs[-1] += head
    sizes = [1] * count
    for _ in range(config.model.layers - count):
        cheapest = min(range(count), key=costs.__getitem__)
        sizes[cheapest] += 1
        costs[cheapest] += 1.0
    return sizes


def _least(config: Config, vocabulary: int, count: int) -> list[int]:
    """The cut whose costliest stage costs least, of those the one with most blocks first.

    By dynamic programming: best[i] is the least cost of the blocks from i on in so many stages.
    """
    blocks, table = block_parameters(config), vocabulary * config.model.d_model
    layers, upto = len(blocks), [0.0, *itertools.accumulate(blocks)]
    best = [upto[-1] - upto[i] + table for i in range(layers)] + [math.inf]
    cuts = []  # of each stage but the last, by where it begins, where it ends
    for stage in reversed(range(count - 1)):
        own = EMBEDDING_COST * table if stage == 0 else 0.0
        costs, ends = [math.inf] * (layers + 1), [layers] * (layers + 1)
        for first in range(layers):
            for end in range(first + 1, layers):
                cost = max(upto[end] - upto[first] + own, best[end])
                if cost <= costs[first]:
                    costs[first], ends[first] = cost, end
        best = costs
        cuts.append(ends)
    bounds = [0]
    for ends in reversed(cuts):
        bounds.append(ends[bounds[-1]])
    return [end - first for first, end in itertools.pairwise([*bounds, layers])]
