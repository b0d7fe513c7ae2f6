"""The optimizer of each level: the run's, but for what the level's own `optimizer` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nlscale.config import schema
from nlscale.config.keys import to_plain
from nlscale.config.optimizer import OptimizerConfig
from nlscale.config.scalars import Plain
from nlscale.config.schema import Kind
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError

_RUN_WIDE = {
    "learning_rate": "the factor of a level is its learning_rate, beside its optimizer",
    "clip_scope": "it says over which levels a norm is taken",
}
"""Keys that no level can have for itself, and why."""
_KIND = Kind("level", OptimizerConfig, "keys of optimizer", "", "")


def of_level(config: Config, level: int) -> OptimizerConfig:
    """The `optimizer` section as it is for a level of the spectrum."""
    own = config.levels.spectrum[level].optimizer
    if not own:
        return config.optimizer
    return schema.build(_merged(to_plain(config.optimizer), own), _KIND, {})


def settle(config: Config, sources: Mapping[str, str]) -> None:
    """Check what each level's own `optimizer` says, and give the values their types.

    Raises:
        UserError: no key of `optimizer`, one that no level has for itself, or no value of it.
    """
    for index, entry in enumerate(config.levels.spectrum):
        prefix = f"levels.spectrum.{index}.optimizer"
        for key in entry.optimizer:
            refuse_run_wide(f"{prefix}.{key}", sources)
        try:
            whole = to_plain(of_level(config, index))
        except UserError as error:
            raise UserError(f"{prefix}: {error}{schema.where(prefix, sources)}") from None
        entry.optimizer = _as_in(whole, entry.optimizer)


def refuse_run_wide(key: str, sources: Mapping[str, str] | None = None) -> None:
    """Refuse a dotted key that a level's `optimizer` has not.

    Raises:
        UserError: it is one of the run alone.
    """
    if reason := _RUN_WIDE.get(key.partition(".optimizer.")[2]):
        at = schema.where(key, sources or {})
        raise UserError(f"{key}: no level has one of its own; {reason}{at}")


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = Plain(value) if isinstance(value, str) else value
    return merged


def _as_in(whole: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, with the values that the whole has."""
    return {
        str(key): _as_in(whole[key], value) if isinstance(value, dict) else whole[key]
        for key, value in given.items()
    }
