"""The mixers by name: the one place that knows which there are.

A mixer of this package takes its folder, a line here, and its name in
`nlscale.config.vocabulary.MIXERS`. A package of your own calls `register` when it is imported; a
recipe names it in `run.imports`.
"""

from __future__ import annotations

from typing import Any

from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.schema import nearest
from nlscale.config.vocabulary import MIXERS, Decay
from nlscale.errors import UserError
from nlscale.model.mixers.attention.facts import AttentionFacts
from nlscale.model.mixers.facts import MixerFacts
from nlscale.model.mixers.memory.facts import MemoryFacts

_TABLE: dict[str, MixerFacts] = {
    "hope": MemoryFacts(modifies_itself=True, main_memory=True),
    "hope-pure": MemoryFacts(modifies_itself=True, main_memory=False),
    "hope-paper": MemoryFacts(modifies_itself=True, main_memory=False),
    "gated-delta": MemoryFacts(modifies_itself=False, main_memory=True),
    "deltanet": MemoryFacts(modifies_itself=False, main_memory=True, decay=Decay.none),
    "retnet": MemoryFacts(modifies_itself=False, main_memory=True, erases=False, decay=Decay.fixed),
    "linear-attention": MemoryFacts(modifies_itself=False, main_memory=True, erases=False),
    "attention": AttentionFacts(),
    "sliding-window": AttentionFacts(windowed=True),
}


def mixer(name: str) -> MixerFacts:
    """What is known of the mixer of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _TABLE:
        raise UserError(f"no mixer is called {name!r}; {nearest(name, _TABLE)}")
    return _TABLE[name]


def plain_mixer(name: str) -> Any:
    """The class of the mixer of that name in plain torch; it imports torch.

    Raises:
        UserError: there is no such mixer, or it has none.
    """
    facts = mixer(name)
    if facts.plain_by is None:
        raise UserError(
            f"the mixer {name} says nothing in plain torch, of which models for Hugging Face are "
            f"made; give its facts plain_by and plain_options, or export with --to safetensors"
        )
    return facts.plain()


def register(name: str, facts: MixerFacts, preset: dict[str, float | bool] | None = None) -> None:
    """Add a mixer, which `model.mixer` can name from then on.

    Args:
        name: of the mixer.
        facts: what is known of it.
        preset: what keys of `model.memory` mean that a recipe leaves null.

    Raises:
        UserError: the name is taken.
    """
    if name in _TABLE:
        raise UserError(f"a mixer is called {name!r} already; give yours another name")
    _TABLE[name] = facts
    MIXERS.append(name)
    if preset is not None:
        MIXER_PRESETS[name] = preset
