"""How large each sync group of the model is, from the configuration alone (no tensors)."""

from __future__ import annotations

from nlscale.config.vocabulary import Config
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
from nlscale.model.sizes import level_parameters, tables


def group_parameters(
    config: Config, levels: list[Level], vocabulary: int, stagger: bool
) -> dict[SyncGroup, int]:
    """Parameters of each sync group, in the order of levels and phases."""
    layers = config.model.layers
    counts: dict[SyncGroup, int] = {}
    for level, depths in zip(levels, parameters_by_depth(config, vocabulary), strict=True):
        for depth, parameters in enumerate(depths):
            group = sync_group(level, depth, layers, stagger)
            counts[group] = counts.get(group, 0) + parameters
    return dict(sorted(counts.items()))


def parameters_by_depth(config: Config, vocabulary: int) -> list[list[int]]:
    """[level][depth]; the embedding counts with the first block, last norm and head with the last.

    A head that is the embedding counts as that.

    All blocks are alike, so what a block holds is what `level_parameters` counts for a model
    without vocabulary, less its last norm, divided by the layers.
    """
    layers, width = config.model.layers, config.model.d_model
    blocks = level_parameters(config, vocabulary=0)
    blocks[0] -= width
    table = [[total // layers] * layers for total in blocks]
    table[0][0] += vocabulary * width
    table[0][-1] += (tables(config) - 1) * vocabulary * width + width
    return table
