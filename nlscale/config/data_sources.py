"""What `data` says of where the tokens are from: one folder, or a mixture of sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from nlscale.config.schema import where
from nlscale.config.vocabulary import Config, DataConfig, SourceConfig
from nlscale.errors import UserError


def name_of(source: SourceConfig) -> str:
    """What a source is called in metrics: its name, else the last part of its folder."""
    return source.name if source.name is not None else Path(source.dir).name


def mixtures_of(data: DataConfig) -> dict[str, list[SourceConfig]]:
    """The mixtures of a run by key, in their order; none where it reads `data.dir` alone.

    Where a stage has one, `data.dir` before it is a mixture of one.
    """
    begins = {"data.mixture": data.mixture} if data.mixture else {}
    stages = {f"data.stages.{i}.mixture": stage.mixture for i, stage in enumerate(data.stages)}
    later = {key: mixture for key, mixture in stages.items() if mixture}
    if later and data.dir is not None:
        begins = {"data.dir": [SourceConfig(dir=data.dir, weight=1.0)]}
    return begins | later


def folders_of(data: Any) -> list[str]:
    """The data folders that a section `data` of plain dicts names, see `DataConfig.folders`.

    Args:
        data: as it was saved; of what is no such section there are none.
    """
    if not isinstance(data, dict):
        return []
    own, stages = data.get("dir"), data.get("stages")
    begins = [own] if own else _dirs(data)
    later = (
        [folder for stage in stages for folder in _dirs(stage)] if isinstance(stages, list) else []
    )
    return list(dict.fromkeys([*begins, *later]))


def _dirs(section: Any) -> list[str]:
    """Of the mixture of a section or stage."""
    mixture = section.get("mixture") if isinstance(section, dict) else None
    if not isinstance(mixture, list):
        return []
    return [source["dir"] for source in mixture if isinstance(source, dict) and "dir" in source]


def settle(config: Config, sources: Mapping[str, str]) -> None:
    """Check that there are data, and that the sources of a mixture can be told apart.

    Args:
        config: to be checked.
        sources: file and line of each dotted key.

    Raises:
        UserError: neither data.dir nor a mixture, or both; two sources of one name, one of two
            names, or a name that is none; weights of some sources only; a temperature beside
            weights.
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
    mixtures = mixtures_of(data)
    for key, mixture in mixtures.items():
        _check_names(key, mixture, sources)
        _check_weights(key, mixture, sources)
    _check_across(mixtures, sources)
    weighed = [mixture[0].weight is not None for mixture in mixtures.values()]
    if data.temperature != 1 and all(weighed):
        why = "the sources have weights" if weighed else "there is no data.mixture"
        _refuse("data.temperature", f"it makes weights where none are given, and {why}", sources)


def _check_names(key: str, mixture: list[SourceConfig], sources: Mapping[str, str]) -> None:
    names: dict[str, int] = {}
    for number, source in enumerate(mixture):
        name_key, name = f"{_at(key, number)}.name", name_of(source)
        if not name.strip(" .") or "/" in name:
            _refuse(
                name_key, f"{name!r} is no name; give one without a slash, such as web", sources
            )
        if name in names:
            _refuse(
                name_key,
                f"{key}.{names[name]} is called {name!r}, too; give one of them another "
                f"name: {{dir: ..., name: ...}}",
                sources,
            )
        names[name] = number


def _check_weights(key: str, mixture: list[SourceConfig], sources: Mapping[str, str]) -> None:
    given = [number for number, source in enumerate(mixture) if source.weight is not None]
    if given and len(given) < len(mixture):
        lacking = next(n for n in range(len(mixture)) if n not in given)
        _refuse(
            f"{key}.{lacking}.weight",
            f"there is none, and {key}.{given[0]} has one; give every source a weight, or "
            f"none, and data.temperature",
            sources,
        )


def _check_across(mixtures: Mapping[str, list[SourceConfig]], sources: Mapping[str, str]) -> None:
    """In all mixtures of a run a folder has one name, and no other folder has that."""
    names: dict[str, tuple[str, str]] = {}
    folders: dict[str, tuple[str, str]] = {}
    for key, mixture in mixtures.items():
        for number, source in enumerate(mixture):
            name, at = name_of(source), _at(key, number)
            called, other = folders.get(source.dir, (name, at))
            if called != name:
                _refuse(
                    f"{at}.name",
                    f"{other} is {source.dir}, too, and is called {called!r}; give both one name",
                    sources,
                )
            folder, other = names.get(name, (source.dir, at))
            if folder != source.dir:
                _refuse(
                    f"{at}.name",
                    f"{other} is called {name!r}, too, and is {folder}; give one of them another "
                    f"name: {{dir: ..., name: ...}}",
                    sources,
                )
        folders |= {s.dir: (name_of(s), _at(key, n)) for n, s in enumerate(mixture)}
        names |= {name_of(s): (s.dir, _at(key, n)) for n, s in enumerate(mixture)}


def _at(key: str, number: int) -> str:
    """The key of a source of a mixture."""
    return key if key == "data.dir" else f"{key}.{number}"


def _refuse(key: str, why: str, sources: Mapping[str, Any]) -> NoReturn:
    at = where(key, sources) or where(key.rpartition(".")[0], sources)
    raise UserError(f"{key}: {why}{at}")
