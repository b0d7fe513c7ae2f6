"""Where the stack of blocks is cut into pipeline stages, from the configuration alone."""

from __future__ import annotations

from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.model.sizes import level_parameters

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


def _balanced(config: Config, vocabulary: int, count: int) -> list[int]:
    """One block to each stage, then each further one to the stage that is cheapest with it."""
    block = sum(level_parameters(config, vocabulary=0)) / config.model.layers
    head = vocabulary * config.model.d_model / block
    costs = [1.0] * count
    costs[0] += EMBEDDING_COST * head
    costs[-1] += head
    sizes = [1] * count
    for _ in range(config.model.layers - count):
        cheapest = min(range(count), key=costs.__getitem__)
        sizes[cheapest] += 1
        costs[cheapest] += 1.0
    return sizes
