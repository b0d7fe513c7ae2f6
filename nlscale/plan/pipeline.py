"""How a pipeline passes its micro batches: what a rank keeps of them, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config.vocabulary import Config
from nlscale.model.stages import stage_blocks, stage_costs


@dataclass(frozen=True)
class Pipeline:
    """The pipeline of a run; without one, a single rank that never waits."""

    ranks: int
    virtual_stages: int
    """Model stages a rank."""
    micro_batches: int
    """Of a step, each passing through all stages."""
    bubble: float
    """Share of a step in which a rank waits, were all stages equal and the network for nothing:
    (p - 1) / (v m + p - 1) for p ranks, v stages a rank and m micro batches."""
    imbalance: float
    """Cost of the costliest stage over the mean, in parameters as `stage_blocks` counts them."""


def pipeline(config: Config, vocabulary: int, micro_batches: int) -> Pipeline:
    """The pipeline of a configuration whose ranks pass that many micro batches a step.

    Raises:
        UserError: fewer blocks than stages, or `parallel.stages` that do not fit.
    """
    ranks, virtual = config.parallel.pipeline, config.parallel.virtual_stages
    costs = stage_costs(config, vocabulary, stage_blocks(config, vocabulary))
    return Pipeline(
        ranks=ranks,
        virtual_stages=virtual,
        micro_batches=micro_batches,
        bubble=(ranks - 1) / (virtual * micro_batches + ranks - 1),
        imbalance=max(costs) * len(costs) / sum(costs),
    )


def most_kept(stages: list[float], ranks: int, rank: int, micro_batches: int) -> float:
    """The most that a pipeline rank keeps at once for backward passes still to come.

    Follows megatron-core's schedules. 1F1B: `ranks - rank` micro batches. Interleaved: groups of
    `ranks` micro batches pass through each of the rank's stages in turn; its forward passes are
    ahead of its backward passes by the warm-up, 2 (ranks - rank - 1) + (stages - 1) ranks, and one.

    Args:
        stages: what a micro batch leaves in each model stage of this rank, first stage first.
        ranks: of the pipeline.
        rank: this one, from 0.
        micro_batches: of a step.
    """
    if len(stages) == 1:
        return stages[0] * min(micro_batches, ranks - rank)
    ahead = 2 * (ranks - rank - 1) + (len(stages) - 1) * ranks
    order = [
        stage
        for first in range(0, micro_batches, ranks)
        for stage in range(len(stages))
        for _ in range(min(ranks, micro_batches - first))
    ]
    kept = most = 0.0
    for i, stage in enumerate(order):
        kept += stages[stage]
        most = max(most, kept)
        if i >= ahead:  # a backward pass: in the same order, from the last stage to the first
            kept -= stages[-1 - order[i - ahead]]
    return most
