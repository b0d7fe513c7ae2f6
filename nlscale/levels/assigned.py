"""Which parameter takes which optimizer rule, and at what rate, decay and memory of gradients.

Told by the model itself and by the optimizers themselves: what is a matrix, what decays and what
grows with the width is said once, by the tags of the modules (`nlscale.model.init.tag`), which a
mixer of another package has as well, and what a rule makes of them by its parameter groups. So the
model is built, of one rank, on torch's meta device, where tensors have shapes and no values.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from nlscale.config.level_optimizer import of_level
from nlscale.config.vocabulary import Config, OptimizerConfig, ParallelConfig
from nlscale.levels.spectrum import Level, levels_of
from nlscale.model.decoder import Decoder
from nlscale.model.layers import megatron_config
from nlscale.model.width import width_multiplier
from nlscale.optim.period import at_period, decay_at
from nlscale.optim.table import REST, rule

Shapes = dict[tuple[int, ...], int]
"""How many tensors of each shape."""


@dataclass(frozen=True)
class Kind:
    """The parameters of one name, over all blocks."""

    name: str
    """With `*` in place of the block's number."""
    tensors: int
    """One a block, or one."""
    shapes: Shapes
    """Of one tensor: its matrices [out, in], section by section or head by head, where the rule
    takes whole matrices; else as it is."""
    parameters: int
    """In all of its tensors."""
    rule: str
    rate: float
    """Factor on `optimizer.learning_rate`: the level's, that of matrices and that of the width."""
    decay: float
    """Weight decay, per update, at the peak of the learning rate."""


@dataclass(frozen=True)
class LevelRules:
    """The rules of a level, and what is under them."""

    level: Level
    kinds: list[Kind]
    """In the order of the model; none of a level that holds copies."""
    numbers: dict[str, dict[str, float]]
    """Of each rule that has a parameter here: those that it has of its own, as they are at the
    level's period."""


def assigned(config: Config, vocabulary: int) -> list[LevelRules]:
    """What every parameter of a model is under, by level, fastest first.

    Args:
        config: the run; how it is spread over ranks does not matter.
        vocabulary: token ids.
    """
    levels = levels_of(config)
    alone = replace(config, parallel=ParallelConfig())
    with torch.device("meta"):
        model = Decoder(alone, megatron_config(alone), vocabulary)
    named: list[dict[str, Any]] = [{} for _ in levels]
    for name, parameter in model.named_parameters():
        named[model.level_and_depth(name)[0]][name] = parameter
    return [_of_level(config, level, named[level.index]) for level in levels]


def _of_level(config: Config, level: Level, named: dict[str, Any]) -> LevelRules:
    if level.copy is not None:
        return LevelRules(level, [], {})
    own = at_period(of_level(config, level.index), level.period)
    made = rule(own.rule).make(own, width_multiplier(config.model), [*named.values()])
    group_of = {p: group for group in made.param_groups for p in group["params"]}
    kinds: dict[tuple[str, ...], Kind] = {}  # by name and, where mixers differ, by shape
    for name, parameter in named.items():
        pattern = re.sub(r"^(blocks)\.\d+\.", r"\1.*.", name)
        key = pattern, str([*parameter.shape])
        if key in kinds:
            before = kinds[key]
            more = before.parameters + parameter.numel()
            kinds[key] = replace(before, tensors=before.tensors + 1, parameters=more)
            continue
        whole = rule(own.rule).whole_matrices
        group = group_of[parameter]
        rate = level.learning_rate_scale * group["lr_mult"]
        peak = own.learning_rate * rate
        kinds[key] = Kind(
            name=pattern,
            tensors=1,
            shapes=_matrices(parameter) if whole and parameter.matrix else {(*parameter.shape,): 1},
            parameters=parameter.numel(),
            rule=own.rule if parameter.matrix or not whole else REST,
            rate=rate,
            decay=decay_at(own, group["weight_decay"], peak, level.period),
        )
    names = dict.fromkeys(kind.rule for kind in kinds.values())
    return LevelRules(level, [*kinds.values()], {name: _numbers(own, name) for name in names})


def _matrices(parameter: Any) -> Shapes:
    """Those of a whole parameter, as `nlscale.levels.exchange` cuts it."""
    if parameter.dim() == 3:
        heads, out, into = parameter.shape
        return {(out, into): heads}
    rows, columns = parameter.shape
    return dict(Counter((section, columns) for section in parameter.sections or (rows,)))


def _numbers(own: OptimizerConfig, name: str) -> dict[str, float]:
    """Of the section that is called as the rule is; a rule without one has the betas."""
    section = getattr(own, name, None)
    if not is_dataclass(section):
        return {"beta1": own.beta1, "beta2": own.beta2}
    return {f.name: getattr(section, f.name) for f in fields(section)}
