"""A sweep file: reading it, and checking everything that can be checked without its recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nlscale.config import recipe, scalars, schema
from nlscale.config.fields import path as path_field
from nlscale.config.fields import within
from nlscale.config.units import Period
from nlscale.errors import UserError
from nlscale.scaling.compare.question import VAL_LOSS, Question
from nlscale.scaling.sweep.ladder import Ladder

_MOST = 1_000_000
_SIZE, _TOKENS, _PER_PARAMETER = "size", "tokens", "per_parameter"
_SEED = "run.seed"
_BUILD = "write it as it is typed: nlscale data build --source ... --out ..."
_SEARCH = "write {key: optimizer.learning_rate, values: [1e-3, 2e-3], seed: 1, length: 0.25}"
_OURS = ("run.dir", "run.purpose", "resume.start", "checkpoint.steps", "checkpoint.keep_every")
"""Keys that a sweep sets itself."""


@dataclass(frozen=True)
class Budget:
    """The length of a run: so many tokens a parameter, or so many tokens."""

    per_parameter: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Value:
    """One value of an axis."""

    name: str
    """What a run that has it is called after it."""
    keys: dict[str, Any] = field(default_factory=dict)
    """The configuration keys that it sets."""
    budget: Budget | None = None
    """How long it trains, on the axis `tokens`."""
    target: int | None = None
    """Parameters it should have, on a ladder of sizes."""


@dataclass(frozen=True)
class Search:
    """A setting that is chosen before the runs of a sweep; see `nlscale.scaling.sweep.search`."""

    key: str
    values: list[Value]
    keep: int
    """How many of the best go on."""
    seed: int
    """Of the runs that choose."""
    length: float
    """Share of a run's length that they have."""


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read."""

    path: Path
    recipe: str
    """Its path or name."""
    folder: Path
    common: dict[str, Any]
    """Dotted keys that all runs set otherwise than the recipe."""
    axes: dict[str, list[Value]]
    ladder: Ladder | None = None
    """How the sizes of the axis `size` follow from their targets."""
    workers: int | None = None
    build_data: tuple[str, ...] = ()
    """Commands that build what its runs read, `nlscale data build ...`."""
    compare: Question | None = None
    """What is asked of its runs at the end."""
    search: Search | None = None
    share: float = 1.0
    """Of its length that each run has."""

    @property
    def when_finished(self) -> str:
        """What is said when all runs have: what comes next, where no comparison or search does."""
        asks = self.compare is not None or "run.purpose" in self.common
        return "All have finished" + ("." if asks else f": nlscale fit {self.folder}")


@dataclass
class _File:
    """The keys of a sweep file."""

    recipe: str = path_field()
    dir: str = path_field()
    set: Any = None
    axes: Any = MISSING
    search: Any = None
    workers: int | None = within(None, above=0, most=4096)
    build_data: Any = ""
    compare: Any = None


_SWEEP = schema.Kind(
    name="sweep file",
    schema=_File,
    form=f"a sweep is a mapping of {', '.join(each.name for each in fields(_File))}",
    folder="recipes/sweeps",
    unset="{} not set; see recipes/sweeps",
)


def read_sweep(given: str | Path) -> Sweep:
    """Read and check a sweep file, by its path or name.

    Raises:
        UserError: no such file, not YAML, an unknown or missing key, an axis without values, two
            values of one name, two axes that set the same key.
    """
    tree, sources = schema.read(given, _SWEEP)
    path = Path(sources[""])
    file = schema.build(tree, _SWEEP, sources)
    axes, ladder = _axes(file.axes, path)
    sweep = Sweep(
        path=path,
        recipe=file.recipe,
        folder=Path(file.dir),
        common=_keys(file.set or {}, f"{path}: set"),
        axes=axes,
        ladder=ladder,
        workers=file.workers,
        build_data=_commands(file.build_data, f"{path}: build_data"),
        compare=_question(file.compare, f"{path}: compare") if file.compare is not None else None,
        search=_search(file.search, axes, f"{path}: search") if file.search is not None else None,
    )
    if sweep.search is not None and sweep.search.keep > 1 and sweep.compare is not None:
        raise UserError(
            f"{path}: search.keep is {sweep.search.keep}, and compare would have several runs for "
            f"one place; keep 1, or compare them yourself (nlscale compare --by {sweep.search.key})"
        )
    _check_overlap(sweep)
    return sweep


def _axes(tree: Any, path: Path) -> tuple[dict[str, list[Value]], Ladder | None]:
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: axes is empty; the simplest is axes: {{run.seed: [1, 2]}}")
    axes, ladder = {}, None
    for name, value in tree.items():
        where = f"{path}: axes.{name}"
        if not value:
            raise UserError(f"{where} has no values")
        if name == _TOKENS:
            axes[name] = _budgets(value, where)
        elif name == _SIZE and isinstance(value, dict) and "parameters" in value:
            axes[name], ladder = _sizes(value, where)
        elif isinstance(value, dict):
            axes[name] = [_bundle(k, v, f"{where}.{k}") for k, v in value.items()]
        elif isinstance(value, list):
            axes[name] = [_of_key(str(name), item, where) for item in value]
        else:
            raise UserError(
                f"{where} is {scalars.shown(value)}; it must be a list of values, or named bundles"
            )
        names = [one.name for one in axes[name]]
        for twice in names:
            if names.count(twice) > 1:
                raise UserError(f"{where}: two values are called {twice}; take out or rename one")
    return axes, ladder


def _commands(tree: Any, where: str) -> tuple[str, ...]:
    given = tree if isinstance(tree, list) else [tree] if tree else []
    for command in given:
        if not isinstance(command, str):
            raise UserError(f"{where}: {scalars.shown(command)} is no command; {_BUILD}")
    return tuple(given)


def _question(tree: Any, where: str) -> Question:
    """With the options of `nlscale compare`."""
    known = ("by", "each", "metric", "baseline", "effect")
    if not isinstance(tree, dict) or not tree.get("by"):
        raise UserError(f"{where}: write what is compared, such as {{by: model.mixer}}")
    _known(tree, known, where)
    by = tree["by"] if isinstance(tree["by"], list) else [tree["by"]]
    each, baselines = tree.get("each"), tree.get("baseline") or {}
    if not isinstance(baselines, dict):
        raise UserError(f"{where}.baseline: write a value for a key: {{model.mixer: attention}}")
    for key in (*by, *([each] if each else []), *baselines):
        if not recipe.has_key(str(key)):
            raise UserError(f"{where}: {recipe.unknown_key(str(key))}")
    effect = tree.get("effect")
    return Question(
        by=[str(key) for key in by],
        metric=str(tree.get("metric", VAL_LOSS)),
        baselines={str(key): str(value) for key, value in baselines.items()},
        each=None if each is None else str(each),
        effect=None if effect is None else _number(effect, f"{where}.effect", float),
    )


def _search(tree: Any, axes: dict[str, list[Value]], where: str) -> Search:
    known = ("key", "values", "keep", "seed", "length")
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {scalars.shown(tree)}; {_SEARCH}")
    _known(tree, known, where)
    key, values = tree.get("key"), tree.get("values")
    if not isinstance(key, str) or not isinstance(values, list) or len(values) < 2:
        raise UserError(f"{where}: a key and two values of it or more are needed; {_SEARCH}")
    named = [_of_key(key, value, f"{where}.values") for value in values]
    if len({str(value.name).replace('"', "") for value in named}) < len(named):
        raise UserError(f"{where}.values: one of them is there twice")
    setters = [axis for axis, of in axes.items() for value in of if key in value.keys]
    if setters:
        raise UserError(f"{where}: the axis {setters[0]} sets {key}; what is searched no axis sets")
    seeds = [value.keys.get(_SEED) for value in axes.get(_SEED, [])]
    if not seeds or None in seeds:
        raise UserError(f"{where}: the runs need seeds of their own: an axis {_SEED}: [2, 3, 4]")
    taken = {round(_number(seed, f"{where}: axes.{_SEED}", int)) for seed in seeds}
    found = Search(
        key,
        named,
        round(_number(tree.get("keep", 1), f"{where}.keep", int)),
        round(_number(tree.get("seed"), f"{where}.seed", int)),
        _number(tree.get("length", 1), f"{where}.length", float),
    )
    if found.seed in taken:
        raise UserError(
            f"{where}: seed {found.seed} is on the axis {_SEED} as well; a seed that chooses a "
            f"setting says nothing of what the setting is worth: take another"
        )
    if found.keep >= len(named):
        raise UserError(f"{where}: of {len(named)} values {found.keep} are kept; keep fewer")
    if found.length > 1:
        raise UserError(f"{where}.length is {found.length:g}; it is a share of a run, at most 1")
    return found


def _of_key(key: str, value: Any, where: str) -> Value:
    """A value of an axis that is named by its key."""
    keys = _keys({key: value}, where)
    value = scalars.guess(value)
    return Value(_name(value if isinstance(value, str) else f"{key.split('.')[-1]}{value}"), keys)


def _bundle(name: Any, tree: Any, where: str) -> Value:
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"{where} is {scalars.shown(tree)}; it must be keys such as {{model.d_model: 64}}"
        )
    return Value(_name(scalars.guess(name)), _keys(tree, where))


def _budgets(tree: Any, where: str) -> list[Value]:
    if isinstance(tree, list):
        return [
            Value(_name(scalars.guess(each)), budget=Budget(tokens=_count(each, where)))
            for each in tree
        ]
    if isinstance(tree, dict):
        _known(tree, (_PER_PARAMETER,), where)
        values = tree[_PER_PARAMETER]
        if isinstance(values, list) and values:
            counts = [_number(each, where, float) for each in values]
            return [Value(f"{n:g}x", budget=Budget(per_parameter=n)) for n in counts]
    raise UserError(f"{where}: write {{{_PER_PARAMETER}: [5, 10, 20]}}, or token budgets: [1M, 2M]")


def _sizes(tree: dict[str, Any], where: str) -> tuple[list[Value], Ladder]:
    _known(tree, ("parameters", "width_per_layer", "head_dim"), where)
    ladder = Ladder(
        _number(tree.get("width_per_layer"), f"{where}.width_per_layer", float),
        round(_number(tree.get("head_dim"), f"{where}.head_dim", int)),
    )
    targets = tree["parameters"]
    if isinstance(targets, list):
        targets = dict.fromkeys(map(_scalar, targets))
    if not isinstance(targets, dict) or not targets:
        raise UserError(f"{where}.parameters: write a list such as [100M, 340M]")
    values = [
        Value(
            _name(scalars.guess(name)),
            _keys(keys or {}, f"{where}.parameters.{name}"),
            None,
            _count(name, where),
        )
        for name, keys in targets.items()
    ]
    return values, ladder


def _keys(tree: Any, where: str) -> dict[str, Any]:
    """Configuration keys, dotted; nested mappings are flattened."""
    if not isinstance(tree, dict):
        raise UserError(
            f"{where} is {scalars.shown(tree)}; it must be keys such as {{model.d_model: 64}}"
        )
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            inner = _keys({f"{key}.{name}": item for name, item in value.items()}, where)
        else:
            _check_key(str(key), where)
            inner = {str(key): value}
        twice = found.keys() & inner.keys()
        if twice:
            raise UserError(f"{where}: {min(twice)} is there twice")
        found |= inner
    return found


def _check_key(key: str, where: str) -> None:
    if key in _OURS:
        raise UserError(f"{where}: {key} is what a sweep sets itself for each run")
    if not recipe.has_key(key):
        raise UserError(f"{where}: {recipe.unknown_key(key)}")


def _check_overlap(sweep: Sweep) -> None:
    """Two axes that set one key would undo each other."""
    setters: dict[str, str] = {}
    for axis, values in sweep.axes.items():
        keys = {key for value in values for key in value.keys}
        if axis == _SIZE and sweep.ladder:
            keys |= set(Ladder.KEYS)
        if axis == _TOKENS:
            keys.add("train.steps")
        for key in sorted(keys):
            other = setters.setdefault(key, axis)
            if other != axis:
                raise UserError(f"{sweep.path}: the axes {other} and {axis} both set {key}")


def _known(tree: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in tree:
        if key not in known:
            raise UserError(f"{where}: {schema.unknown_name(str(key), known)}")


def _name(value: Any) -> str:
    """A text that can be part of the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._+]+", ".", str(value)).strip(".") or "none"


def _count(value: Any, where: str) -> int:
    try:
        return Period.parse(f"{scalars.guess(value)} tokens").count
    except UserError:
        raise UserError(
            f"{where}: {scalars.shown(value)} is not a count such as 340M or 1.3B"
        ) from None


def _scalar(value: Any) -> Any:
    """What an entry of a list is called; what is none is refused by who reads it."""
    return value if isinstance(value, str) else str(value)


def _number(value: Any, where: str, kind: type) -> float:
    """A number of a grid, above 0 and at most `_MOST`."""
    try:
        found = float(scalars.read(value, kind))
    except scalars.Unreadable:
        found = math.nan
    if not 0 < found <= _MOST:
        what = "a whole number" if kind is int else "a number"
        raise UserError(
            f"{where} is {scalars.shown(value)}; it must be {what} above 0 and at most {_MOST:,}"
        )
    return found
