"""The blocks of a model by their mixer: all alike, or as `model.pattern` has them in turn.

What a mixer is asked, it is asked with a configuration of its own, in which every block has it: so
no mixer knows of patterns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nlscale.config.vocabulary import AttentionConfig, Config, ModelConfig
from nlscale.errors import UserError
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
    """The mixers of a model, in the order in which blocks have them first; with memories of two
    settings one counts as two.

    Raises:
        UserError: there is no mixer of that name.
    """
    kinds: list[BlockKind] = []
    for depth in range(config.model.layers):
        model = model_of(config.model, depth)
        alike = [kind for kind in kinds if kind.config.model == model]
        if alike:
            alike[0].depths.append(depth)
        else:
            own = config if model is config.model else replace(config, model=model)
            kinds.append(BlockKind(mixer(model.mixer), own, [depth]))
    return kinds


def model_of(model: ModelConfig, depth: int) -> ModelConfig:
    """The model, were all its blocks of the mixer of that one: with its memory, and with
    `model.attention` if it reads that."""
    if not model.pattern:
        return model
    entry = model.pattern[depth % len(model.pattern)]
    attention = model.attention if mixer(entry.mixer).reads_attention else AttentionConfig()
    return replace(model, mixer=entry.mixer, pattern=[], memory=entry.memory, attention=attention)


def document_chunk(config: Config) -> int:
    """Tokens of a chunk into which documents are laid out, the same for all memories.

    Raises:
        UserError: they differ.
    """
    kinds = block_kinds(config)
    found = {k.config.model.memory.chunk for k in kinds if not k.facts.reads_attention}
    if len(found) > 1:
        raise UserError(
            f"model.pattern has memories with chunks of {', '.join(map(str, sorted(found)))}, and "
            f"data.document_mask lays documents out in chunks of one length; give all the same "
            f"memory.chunk"
        )
    return found.pop() if found else config.model.memory.chunk
