"""What config.json of an export says of what the class of transformers is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nlscale.config.units import declared_period
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.model.pattern import block_kinds
from nlscale.model.sizes import level_hidden, places
from nlscale.model.width import width_multiplier

_OF_A_LEVEL = ("name", "period", "hidden")


def class_keys(config: Config) -> dict[str, Any]:
    """The arguments of `nlscale.checkpoint.export.configuration.NlscaleConfig`.

    Raises:
        UserError: a mixer has options that nothing in plain torch knows.
    """
    model, kinds = config.model, block_kinds(config)
    entries = [
        {"mixer": (own := kind.config.model).mixer, "mixer_options": kind.facts.plain_options(own)}
        for kind in kinds
    ]
    of_depth = {d: entry for kind, entry in zip(kinds, entries, strict=True) for d in kind.depths}
    in_turn = [of_depth[i] for i in range(len(model.pattern) or 1)]
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        **(in_turn[0] if len(entries) == 1 else {"pattern": in_turn}),
        "levels": _levels(config),
        "cms": model.cms.value,
        "norm_eps": model.norm_eps,
        "init_std": model.init_std,
        "width_multiplier": width_multiplier(model),
        "tie_word_embeddings": model.tie_embeddings,
    }


def check_class_keys(described: dict[str, Any], config: Config, where: Path) -> None:
    """Refuse a model that is made otherwise than its run was configured.

    Args:
        described: `config.json`.
        config: of what that holds under "nlscale", with the vocabulary of `described`.
        where: it is from, for messages.

    Raises:
        UserError: naming the first key that differs and both values.
    """
    for key, ours in class_keys(config).items():
        theirs = described.get(key, ours)
        if key == "levels":
            ours, theirs = _compared(ours), _compared(theirs)
        else:  # another version has other options
            ours, theirs = _shared(ours, theirs), _shared(theirs, ours)
        if ours != theirs:
            raise UserError(
                f"{where} says {key}={theirs!r}, and what it holds under nlscale makes that "
                f"{ours!r}; correct what is wrong of both"
            )


def _shared(own: Any, other: Any) -> Any:
    """What a value has under keys that another has too, all the way down."""
    if isinstance(own, dict) and isinstance(other, dict):
        return {key: _shared(own[key], other[key]) for key in own if key in other}
    if isinstance(own, list) and isinstance(other, list) and len(own) == len(other):
        return [_shared(*pair) for pair in zip(own, other, strict=True)]
    return own


def _compared(levels: Any) -> Any:
    try:
        return [{key: level[key] for key in _OF_A_LEVEL} for level in levels]
    except (TypeError, KeyError):  # no levels at all
        return levels


def _levels(config: Config) -> list[dict[str, Any]]:
    """Each level with its parameters by name, `*` standing for any number; fastest first."""
    found = places(config, vocabulary=0)  # of which names know nothing
    levels = []
    for number, level in enumerate(config.levels.spectrum):
        names = [p.name for p in found if p.level == number and not p.copied]
        of = {
            "name": level.name,
            "period": str(declared_period(number, level)),
            "hidden": level_hidden(config)[number],
            "parameters": names if number else "all that no other level has",
        }
        levels.append(of)
    return levels
