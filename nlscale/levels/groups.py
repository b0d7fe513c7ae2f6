"""How large each sync group of the model is, from the configuration alone (no tensors)."""

from __future__ import annotations

from nlscale.config.vocabulary import Config
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
from nlscale.model.sizes import places


def group_parameters(
    config: Config, levels: list[Level], vocabulary: int, stagger: bool
) -> dict[SyncGroup, int]:
    """Parameters of each sync group, in the order of levels and phases."""
    layers = config.model.layers
    counts: dict[SyncGroup, int] = {}
    for place in places(config, vocabulary):
        for depth in place.depths:
            group = sync_group(levels[place.level], depth, layers, stagger)
            counts[group] = counts.get(group, 0) + place.parameters
    return dict(sorted(counts.items()))


def parameters_by_depth(config: Config, vocabulary: int) -> list[list[int]]:
    """[level][depth]; the embedding counts with the first block, last norm and head with the last.

    A head that is the embedding counts as that. A level has nothing at some depths where its parts
    are in no block.
    """
    table = [[0] * config.model.layers for _ in config.levels.spectrum]
    for place in places(config, vocabulary):
        for depth in place.depths:
            table[place.level][depth] += place.parameters
    return table
