"""The configuration of a Transformer of Hugging Face, Llama or Qwen, as one of nlscale.

What our model has no place for is refused by the key of `config.json` that asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale.checkpoint.export import NO_DATA
from nlscale.config import recipe, trees
from nlscale.config.units import Period
from nlscale.config.vocabulary import Config, Dtype
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.plan.checks import check_sizes

_LONGEST = 2048
"""Tokens of a sequence in the recipe, unless the model knows fewer **[choice]**."""
_BATCH = 8
"""Sequences of a step in the recipe **[choice]**."""
_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
"""Of these a level's hidden units are whole ones: of the first of which there are enough."""
_SILU = ("silu", "swish")
"""Names of the one activation."""
_NO_PLACE = "asks for what nlscale's model has no place for"


@dataclass(frozen=True)
class Family:
    """What the classes of one `model_type` have that no key of their config.json says."""

    qk_norm: bool = False
    biases: bool = False
    """Of queries, keys and values, always."""
    head_dim: int | None = None
    """Where config.json has none; None: hidden_size / num_attention_heads."""


_FAMILIES = {
    "llama": Family(),
    "qwen2": Family(biases=True),
    "qwen3": Family(qk_norm=True, head_dim=128),
}


def config_from_llama(
    described: dict[str, Any], where: Path, headless: bool, periods: Sequence[str], dtype: Dtype
) -> Config:
    """A run that goes on from such a model; its data are yet to be named.

    Args:
        described: its `config.json`.
        where: that is, for messages.
        headless: whether no head is among its weights, which are then those of the embedding.
        periods: of the levels that share each MLP's hidden units, fastest first.
        dtype: of the weights.

    Raises:
        UserError: it is of another kind, damaged, or has what our model has not.
    """
    family = _family(described, where)
    _refuse(described, family, where)
    width, heads = (_whole(described, key, where) for key in ("hidden_size", "num_attention_heads"))
    shared = _whole(described, "num_key_value_heads", where, heads)
    size = _whole(described, "head_dim", where, family.head_dim or width // heads)
    tied = described.get("tie_word_embeddings")
    model = {
        "mixer": "attention",
        "layers": _whole(described, "num_hidden_layers", where),
        "d_model": width,
        "heads": heads,
        "cms": "independent" if len(periods) > 1 else "sequential",
        "vocabulary": _whole(described, "vocab_size", where),
        "tie_embeddings": headless if tied is None else bool(tied),
        "rope_base": _rope_base(described, where),
        "norm_eps": _number(described.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        "attention": {
            "kv_heads": None if shared == heads else shared,
            "head_dim": None if size * heads == width else size,
            "qk_norm": family.qk_norm,
        },
    }
    hidden = _shares(_whole(described, "intermediate_size", where), len(periods), where)
    names = ["base"] if len(periods) == 1 else [f"level{i}" for i in range(len(periods))]
    levels = [
        {"name": name, "period": period, "hidden": units}
        for name, period, units in zip(names, periods, hidden, strict=True)
    ]
    longest = _whole(described, "max_position_embeddings", where, _LONGEST)
    length = min(longest, _LONGEST)
    _check_periods(periods, _BATCH * length)
    sections = {
        "model": model,
        "levels": levels,
        "data": {"dir": NO_DATA, "sequence_length": length},
        # of a model that has learned: a rate far below that of a new one [choice]
        "optimizer": {"learning_rate": 2e-5},
        "train": {"dtype": dtype.value, "global_batch": _BATCH, "micro_batch": 1},
    }
    config = recipe.load(None, [f"{k}={trees.dump(v)}" for k, v in sections.items()]).config
    levels_of(config)
    check_sizes(config, ranks=1)
    return config


def _check_periods(periods: Sequence[str], tokens_per_step: int) -> None:
    """Raises UserError: they are not those of levels, fastest first."""
    given, before = f"--levels {','.join(periods)}", 0
    for text in periods:
        try:
            steps = Period.parse(text).in_steps(tokens_per_step)
        except UserError as error:
            raise UserError(f"{given}: {error}; such as --levels 1,4,16") from None
        if steps < before:
            raise UserError(f"{given}: {text} is a shorter period than {before}; fastest first")
        before = steps


def _family(described: dict[str, Any], where: Path) -> Family:
    name = described.get("model_type")
    if not isinstance(name, str) or name not in _FAMILIES:
        known = ", ".join(key for key, family in _FAMILIES.items() if not family.biases)
        raise UserError(f"{where}: model_type is {name!r}; what can be imported is {known}")
    return _FAMILIES[name]


def _refuse(described: dict[str, Any], family: Family, where: Path) -> None:
    kinds = described.get("layer_types") or []
    asked = {
        "attention_bias": described.get("attention_bias"),
        "mlp_bias": described.get("mlp_bias"),
        "use_sliding_window": described.get("use_sliding_window"),
        "layer_types": any(kind != "full_attention" for kind in kinds),
        "hidden_act": described.get("hidden_act", "silu") not in _SILU,
        "quantization_config": described.get("quantization_config"),
        "partial_rotary_factor": described.get("partial_rotary_factor") not in (None, 1),
    }
    if family.biases:
        name = described["model_type"]
        raise UserError(
            f"{where}: model_type={name!r} has biases of queries, keys and values, which nlscale's "
            f"model has not; it cannot be imported"
        )
    for key, wrong in asked.items():
        if wrong:
            raise UserError(f"{where}: {key}={described[key]!r} {_NO_PLACE}; it cannot be imported")


def _rope_base(described: dict[str, Any], where: Path) -> float:
    """Of rotary positions; before version 5 transformers wrote it beside what scales them."""
    key = "rope_parameters" if described.get("rope_parameters") else "rope_scaling"
    found = described.get(key) or {}
    plain = isinstance(found, dict) and not any(isinstance(v, dict) for v in found.values())
    if not plain or found.get("rope_type", found.get("type", "default")) != "default":
        raise UserError(
            f"{where}: {key}={found!r} scales rotary positions, and nlscale's model has "
            f"model.rope_base alone; it cannot be imported"
        )
    if found.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: {key}={found!r} {_NO_PLACE}; it cannot be imported")
    base = found.get("rope_theta", described.get("rope_theta", 10000.0))
    return _number(base, "rope_theta", where)


def _whole(described: dict[str, Any], key: str, where: Path, default: int | None = None) -> int:
    value = described.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}, and must be a whole number above 0")
    return value


def _number(value: Any, key: str, where: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{where}: {key} is {value!r}, and must be a number above 0")
    return float(value)


def _shares(hidden: int, levels: int, where: Path) -> list[int]:
    """Hidden units of each level, as equal as whole multiples let them be."""
    for multiple in _MULTIPLES:
        units, rest = divmod(hidden, multiple)
        if rest == 0 and units >= levels:
            least, more = divmod(units, levels)
            return [(least + (i < more)) * multiple for i in range(levels)]
    raise UserError(f"{where}: intermediate_size {hidden} is less than the {levels} levels")
