"""What `data` says of where the tokens are from: one folder, or a mixture of sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from nlscale.config.schema import where
from nlscale.config.vocabulary import Config, SourceConfig
from nlscale.errors import UserError


def name_of(source: SourceConfig) -> str:
    """What a source is called in metrics: its name, else the last part of its folder."""
    return source.name if source.name is not None else Path(source.dir).name


def settle(config: Config, sources: Mapping[str, str]) -> None:
    """Check that there are data, and that the sources of a mixture can be told apart.

    Args:
        config: to be checked.
        sources: file and line of each dotted key.

    Raises:
        UserError: neither data.dir nor a mixture, or both; two sources of one name, or a name that
            is none; weights of some sources only; a temperature beside weights.
    """
    data = config.data
    if data.dir is None and not data.mixture:
        raise UserError(
            f"data.dir is not set; give it in the recipe or as data.dir=..., or several folders in "
            f"data.mixture{where('data.dir', sources)}"
        )
    if data.dir is not None and data.mixture:
        _refuse("data.mixture", "there is a data.dir, too; give one of the two, the other null or "
                "empty: data.dir=null, data.mixture=[]", sources)  # fmt: skip
    names: dict[str, int] = {}
    for number, source in enumerate(data.mixture):
        key, name = f"data.mixture.{number}.name", name_of(source)
        if not name.strip(" .") or "/" in name:
            _refuse(key, f"{name!r} is no name; give one without a slash, such as web", sources)
        if name in names:
            _refuse(
                key,
                f"data.mixture.{names[name]} is called {name!r}, too; give one of them another "
                f"name: {{dir: ..., name: ...}}",
                sources,
            )
        names[name] = number
    given = [number for number, source in enumerate(data.mixture) if source.weight is not None]
    if given and len(given) < len(data.mixture):
        lacking = next(n for n in range(len(data.mixture)) if n not in given)
        _refuse(
            f"data.mixture.{lacking}.weight",
            f"there is none, and data.mixture.{given[0]} has one; give every source a weight, or "
            f"none, and data.temperature",
            sources,
        )
    if data.temperature != 1 and (given or not data.mixture):
        why = "the sources have weights" if given else "there is no data.mixture"
        _refuse("data.temperature", f"it makes weights where none are given, and {why}", sources)


def _refuse(key: str, why: str, sources: Mapping[str, Any]) -> NoReturn:
    at = where(key, sources) or where(key.rpartition(".")[0], sources)
    raise UserError(f"{key}: {why}{at}")
