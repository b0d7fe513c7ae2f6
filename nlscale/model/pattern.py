"""The blocks of a model by their mixer: all alike, or as `model.pattern` has them in turn.

What a mixer is asked, it is asked with a configuration of its own, in which every block has it: so
no mixer knows of patterns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.vocabulary import AttentionConfig, Config, ModelConfig, mixers_of
from nlscale.model.mixers.facts import MixerFacts
from nlscale.model.mixers.table import mixer


@dataclass(frozen=True)
class BlockKind:
    """The blocks of one mixer."""

    facts: MixerFacts
    config: Config
    """The run, were all blocks of this mixer."""
    depths: list[int]
    """Where they are."""


def block_kinds(config: Config) -> list[BlockKind]:
    """The mixers of a model, in the order in which blocks have them first.

    Raises:
        UserError: there is no mixer of that name.
    """
    depths: dict[str, list[int]] = {}
    for depth, name in enumerate(mixers_of(config.model)):
        depths.setdefault(name, []).append(depth)
    return [
        BlockKind(mixer(name), replace(config, model=model_of(config.model, name)), where)
        for name, where in depths.items()
    ]


def model_of(model: ModelConfig, name: str) -> ModelConfig:
    """The model, were all its blocks of a mixer of its own: keys of `model.memory` that are null
    mean what that mixer's preset says, and `model.attention` is for who reads it."""
    if model.pattern is None:
        return model
    preset = {
        key: value
        for key, value in MIXER_PRESETS.get(name, {}).items()
        if getattr(model.memory, key) is None
    }
    attention = model.attention if mixer(name).reads_attention else AttentionConfig()
    memory = replace(model.memory, **preset)  # type: ignore[arg-type]
    return replace(model, mixer=name, pattern=None, memory=memory, attention=attention)
