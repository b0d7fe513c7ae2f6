"""What the optimizer rules keep of each block's parameters, from the configuration alone."""

from __future__ import annotations

from nlscale.config.level_optimizer import of_level
from nlscale.config.vocabulary import Config
from nlscale.levels.groups import parameters_by_depth
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
from nlscale.model.sizes import level_matrices
from nlscale.optim.table import Rule, rule


def rules_by_level(config: Config) -> list[Rule]:
    """The rule of each level, fastest first: the run's, or the level's own."""
    return [rule(of_level(config, level).rule) for level in range(len(config.levels.spectrum))]


def kept_by_depth(config: Config, vocabulary: int) -> list[list[int]]:
    """Bytes, [level][depth], that the rules keep of what `parameters_by_depth` counts.

    Over all ranks, once a level has updated. Matrices count as under the level's rule, the rest
    as under that of the rest; of a mixer that does not say what its matrices are, all is the rest.
    """
    found = []
    levels = zip(
        rules_by_level(config),
        level_matrices(config),
        parameters_by_depth(config, vocabulary),
        strict=True,
    )
    for own, of_depths, counts in levels:
        of_matrix, of_rest = own.of(True).state_bytes, own.of(False).state_bytes
        elements = [sum(m * n * number for (m, n), number in of.items()) for of in of_depths]
        found.append(
            [
                count * of_rest + (of_matrix - of_rest) * own_matrices
                for count, own_matrices in zip(counts, elements, strict=True)
            ]
        )
    return found


def kept_by_group(config: Config, levels: list[Level], vocabulary: int) -> dict[SyncGroup, int]:
    """The same by sync group."""
    layers, stagger = config.model.layers, config.levels.stagger
    found: dict[SyncGroup, int] = {}
    for level, depths in zip(levels, kept_by_depth(config, vocabulary), strict=True):
        for depth, size in enumerate(depths):
            if not size:
                continue
            group = sync_group(level, depth, layers, stagger)
            found[group] = found.get(group, 0) + size
    return found
