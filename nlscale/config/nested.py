"""What goes with the nested form of CMS, one MLP and slow copies of it (docs/concepts/cms.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from nlscale.config.parts import parts_of
from nlscale.config.schema import where
from nlscale.config.vocabulary import Config, LevelConfig, Part, PeriodWarmupConfig, Tier
from nlscale.errors import UserError

_PLAIN = LevelConfig(name="")
_OF_COPIES = ("hidden", "learning_rate", "optimizer", "wire")
"""Keys of what is trained by a gradient."""


def check(config: Config, sources: Mapping[str, str] | None = None) -> None:
    """Refuse what copies do not go with.

    Args:
        config: of the run.
        sources: where its keys were read, for messages.

    Raises:
        UserError: naming the key.
    """
    parts, spectrum = parts_of(config), config.levels.spectrum

    def refuse(key: str, message: str) -> NoReturn:
        raise UserError(f"{key}{message}{where(key, sources or {})}")

    if not parts.copies:
        return
    (trained,) = parts.mlps
    nested = f"model.cms=nested makes level {spectrum[trained].name!r} the one with an MLP"
    for index in (trained, *parts.copies):
        entry, key = spectrum[index], f"levels.spectrum.{index}"
        if entry.local:
            refuse(
                f"{key}.local", f": {nested}, whose copies are the same on all nodes; leave it out"
            )
        if entry.outer.every is not None:
            refuse(
                f"{key}.outer",
                f": {nested}, and copies take the place of outer steps; leave it out",
            )
        if entry.memory != Tier.hbm:
            refuse(f"{key}.memory", f": {nested}, which is on the GPU with its copies; use hbm")
        if entry.context.chunk is not None:
            refuse(
                f"{key}.context",
                f": {nested}, which does not change while it is read; leave it out",
            )
    for index in parts.copies:
        entry, key = spectrum[index], f"levels.spectrum.{index}"
        holds = f"; level {entry.name!r} holds a copy of the MLP of {spectrum[trained].name!r}"
        for name in _OF_COPIES:
            if getattr(entry, name) != getattr(_PLAIN, name):
                refuse(f"{key}.{name}", f" says nothing{holds} (model.cms=nested); leave it out")
        more = [part.value for part in parts.of_level(index) if part != Part.cms]
        if more:
            refuse(f"{key}.parts", f" names {', '.join(more)}{holds} alone; give it another level")
    if config.levels.period_warmup != PeriodWarmupConfig():
        refuse("levels.period_warmup", f": {nested}, whose copies have periods that do not change")
