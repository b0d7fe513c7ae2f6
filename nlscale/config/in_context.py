"""Which MLPs change inside the context, and what of that does not go together. No tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import yaml

from nlscale.config import schema, trees
from nlscale.config.context import ContextConfig
from nlscale.config.curriculum import largest
from nlscale.config.parts import parts_of
from nlscale.config.vocabulary import Config, ContextObjective
from nlscale.errors import UserError

_KEYS = schema.Kind(
    name="context",
    schema=ContextConfig,
    form="it is keys of a level's context, such as chunk",
    folder="recipes",
    unset="{} is not given",
)
_ONLY = {
    ContextObjective.local: ("decay",),
    ContextObjective.ntp: ("clip", "pull", "reset"),
}
"""Keys that say something of one objective alone."""


@dataclass(frozen=True)
class InContext:
    """A level whose MLPs change while a sequence is read."""

    level: int
    mlp: int
    """The place of its MLP among those of a block."""
    keys: ContextConfig
    depths: range
    """Of the blocks."""

    @property
    def chunk(self) -> int:
        """Tokens between two changes."""
        assert self.keys.chunk is not None, "it changes"
        return self.keys.chunk


def in_context(config: Config, objective: ContextObjective) -> list[InContext]:
    """The levels that change by an objective, fastest first."""
    spectrum, layers = config.levels.spectrum, config.model.layers
    return [
        InContext(level, mlp, keys, keys.depths(layers))
        for mlp, level in enumerate(parts_of(config).mlps)
        if (keys := spectrum[level].context).chunk is not None and keys.objective == objective
    ]


def local_at(config: Config, depth: int) -> list[InContext]:
    """Those of `local` that a block has."""
    return [each for each in in_context(config, ContextObjective.local) if depth in each.depths]


def learning(config: Config, overrides: Sequence[str] = ()) -> list[InContext]:
    """The levels that learn from what a trained model reads, by objective `ntp`, fastest first.

    Args:
        config: of the model.
        overrides: LEVEL.KEY=VALUE, of the keys of `context` of a level, by its name: they are added
            to those of the model, or take their place.

    Raises:
        UserError: no such level or key; a wrong value; what does not go together, as
            `check_contexts`; or no level is left that learns.
    """
    config = copy.deepcopy(config)
    levels = {level.name: level for level in config.levels.spectrum}
    trees_of: dict[str, dict[str, Any]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        name, _, key = key.strip().rpartition(".")
        if not equals or name not in levels:
            raise UserError(
                f"context {text!r} is not LEVEL.KEY=VALUE, of a level of the model: "
                f"{', '.join(levels)}; such as {next(iter(levels))}.chunk=256"
            )
        try:
            trees_of.setdefault(name, {})[key] = trees.load(value)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"context {text!r}: {value!r} is not a YAML value") from None
    for name, tree in trees_of.items():
        own = levels[name].context
        if own.chunk is not None and own.objective != ContextObjective.ntp:
            raise UserError(
                f"level {name!r} of the model changes inside the context by objective "
                f"{own.objective.value}, which it was trained with; have another level learn"
            )
        given = schema.build(tree, _KEYS, {})
        for f in fields(given):
            if f.name in tree:
                setattr(own, f.name, getattr(given, f.name))
        own.objective = given.objective if "objective" in tree else ContextObjective.ntp
        if own.objective != ContextObjective.ntp:
            raise UserError(
                f"context {name}.objective={own.objective.value}: a trained model learns by ntp; "
                f"train one with levels that are {own.objective.value}"
            )
    check_contexts(config)
    found = in_context(config, ContextObjective.ntp)
    if not found:
        raise UserError(
            f"no level of the model learns inside the context; give LEVEL.chunk=TOKENS, such as "
            f"{next(iter(levels))}.chunk=256"
        )
    return found


def described(level: InContext, config: Config) -> dict[str, Any]:
    """A level of objective `ntp` for JSON: its name, and its keys."""
    plain = {
        key: value.value if isinstance(value, Enum) else value
        for key, value in asdict(level.keys).items()
        if key not in _ONLY[ContextObjective.local]
    }
    name = config.levels.spectrum[level.level].name
    return {"level": name, **plain, "blocks": len(level.depths)}


def check_contexts(config: Config) -> None:
    """Refuse keys of `context` that say nothing or do not go together.

    Raises:
        UserError: a key without a chunk, or of the other objective; a level without an MLP; more
            blocks than there are; chunks that are never over, or no multiples of the shortest.
    """
    parts, layers, spectrum = parts_of(config), config.model.layers, config.levels.spectrum
    for index, level in enumerate(spectrum):
        keys, where = level.context, f"levels.spectrum.{index}.context"
        given = [f.name for f in fields(keys) if getattr(keys, f.name) != f.default]
        if keys.chunk is None:
            if given:
                raise UserError(
                    f"{where}.{given[0]} is given, and the level does not change inside the "
                    f"context; give {where}.chunk, or leave it out"
                )
            continue
        if index in parts.copies:
            raise UserError(
                f"{where}.chunk is {keys.chunk}, and level {level.name!r} holds a copy of the MLP "
                f"of {spectrum[parts.mlps[0]].name!r}; have that change, or leave context out"
            )
        if index not in parts.mlps:
            raise UserError(
                f"{where}.chunk is {keys.chunk}, and level {level.name!r} has no MLP: its parts "
                f"leave out cms; name it there, or leave context out"
            )
        for objective, names in _ONLY.items():
            for name in names:
                if objective != keys.objective and name in given:
                    raise UserError(
                        f"{where}.{name} is a key of objective {objective.value}, and this is "
                        f"{keys.objective.value}; leave it out, or change the objective"
                    )
        if keys.blocks is not None and keys.blocks > layers:
            raise UserError(
                f"{where}.blocks {keys.blocks} are more than model.layers {layers}; give at most "
                f"{layers}"
            )
    _check_local(config)
    chunks = [each.chunk for each in in_context(config, ContextObjective.ntp)]
    for chunk in chunks:
        if chunk % min(chunks):
            raise UserError(
                f"levels change inside the context every {chunk} tokens and every {min(chunks)} "
                f"(context.chunk, objective ntp); make each a multiple of the shortest"
            )


def _check_local(config: Config) -> None:
    local, tensor = in_context(config, ContextObjective.local), config.parallel.tensor
    longest = largest(config).sequence_length
    for each in local:
        if each.chunk >= longest:
            raise UserError(
                f"levels.spectrum.{each.level}.context.chunk {each.chunk} is over with the longest "
                f"sequence, of {longest} tokens, and nothing is read after it; use less"
            )
    if local and config.model.d_model % tensor:
        raise UserError(
            f"model.d_model {config.model.d_model} is not divisible by parallel.tensor {tensor}, "
            f"and levels.spectrum.{local[0].level}.context splits its targets; use one that is"
        )
