"""A sweep file: reading it, and checking everything that can be checked without its recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nlscale.config import recipe, scalars, schema
from nlscale.config.fields import path as path_field
from nlscale.config.fields import within
from nlscale.errors import UserError
from nlscale.scaling.compare.question import FINALIST, VAL_LOSS, Question
from nlscale.scaling.sweep.ladder import Ladder
from nlscale.scaling.sweep.values import (
    Value,
    as_text,
    check_known,
    folder_name,
    read_budgets,
    read_bundle,
    read_count,
    read_keys,
    read_number,
    value_of_key,
)

_MOST_ROUNDS = 20
_SIZE, _TOKENS = "size", "tokens"
_SEED = "run.seed"
ROUND = "search.round"
"""The axis of the rounds of a search but the first: no key, and of no file."""
_BUILD = "write it as it is typed: nlscale data build --source ... --out ..."
_SEARCH = "write {key: optimizer.learning_rate, values: [1e-3, 2e-3], seed: 1, length: 0.25}"


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
    """Share of a run's length that they have, in the first round."""
    rounds: int = 1
    """After each but the last the better half goes on to one of twice the length."""

    @property
    def tried(self) -> list[int]:
        """How many values each round tries, if all have a loss."""
        counts = [len(self.values)]
        while len(counts) < self.rounds:
            counts.append(max(self.keep, (counts[-1] + 1) // 2))
        return counts


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
    ranks: int = 1
    """Processes of each run, on this machine."""
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
    ranks: int = within(1, above=0, most=4096)
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
        common=read_keys(file.set or {}, f"{path}: set"),
        axes=axes,
        ladder=ladder,
        workers=file.workers,
        ranks=file.ranks,
        build_data=commands(file.build_data, f"{path}: build_data"),
        compare=_question(file.compare, f"{path}: compare") if file.compare is not None else None,
        search=_search(file.search, axes, f"{path}: search") if file.search is not None else None,
    )
    _check_overlap(sweep)
    return sweep if sweep.search is None else replace(sweep, compare=_of_finalists(sweep))


def _axes(tree: Any, path: Path) -> tuple[dict[str, list[Value]], Ladder | None]:
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: axes is empty; the simplest is axes: {{run.seed: [1, 2]}}")
    axes, ladder = {}, None
    for name, value in tree.items():
        where = f"{path}: axes.{name}"
        if not value:
            raise UserError(f"{where} has no values")
        if name == _TOKENS:
            axes[name] = read_budgets(value, where)
        elif name == _SIZE and isinstance(value, dict) and "parameters" in value:
            axes[name], ladder = _sizes(value, where)
        elif isinstance(value, dict):
            axes[name] = [read_bundle(k, v, f"{where}.{k}") for k, v in value.items()]
        elif isinstance(value, list):
            axes[name] = [value_of_key(str(name), item, where) for item in value]
        else:
            raise UserError(
                f"{where} is {scalars.shown(value)}; it must be a list of values, or named bundles"
            )
        names = [one.name for one in axes[name]]
        for twice in names:
            if names.count(twice) > 1:
                raise UserError(f"{where}: two values are called {twice}; take out or rename one")
    return axes, ladder


def commands(tree: Any, where: str) -> tuple[str, ...]:
    """What `build_data` holds: a command or a list of them.

    Raises:
        UserError: one is no text.
    """
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
    check_known(tree, known, where)
    by = tree["by"] if isinstance(tree["by"], list) else [tree["by"]]
    each, baselines = tree.get("each") or [], tree.get("baseline") or {}
    each = each if isinstance(each, list) else [each]
    if not isinstance(baselines, dict):
        raise UserError(f"{where}.baseline: write a value for a key: {{model.mixer: attention}}")
    for key in (*by, *each, *baselines):
        if key != FINALIST and not recipe.has_key(str(key)):
            raise UserError(f"{where}: {recipe.unknown_key(str(key))}")
    effect = tree.get("effect")
    return Question(
        by=[str(key) for key in by],
        metric=str(tree.get("metric", VAL_LOSS)),
        baselines={str(key): str(value) for key, value in baselines.items()},
        each=[str(key) for key in each],
        effect=None if effect is None else read_number(effect, f"{where}.effect", float),
    )


def _search(tree: Any, axes: dict[str, list[Value]], where: str) -> Search:
    known = ("key", "values", "keep", "seed", "length", "rounds")
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {scalars.shown(tree)}; {_SEARCH}")
    check_known(tree, known, where)
    key, values = tree.get("key"), tree.get("values")
    if not isinstance(key, str) or not isinstance(values, list) or len(values) < 2:
        raise UserError(f"{where}: a key and two values of it or more are needed; {_SEARCH}")
    named = [value_of_key(key, value, f"{where}.values") for value in values]
    if len({str(value.name).replace('"', "") for value in named}) < len(named):
        raise UserError(f"{where}.values: one of them is there twice")
    if ROUND in axes:
        raise UserError(f"{where}: an axis is called {ROUND}, as that of its rounds is; rename it")
    setters = [axis for axis, of in axes.items() for value in of if key in value.keys]
    if setters:
        raise UserError(f"{where}: the axis {setters[0]} sets {key}; what is searched no axis sets")
    seeds = [value.keys.get(_SEED) for value in axes.get(_SEED, [])]
    if not seeds or None in seeds:
        raise UserError(f"{where}: the runs need seeds of their own: an axis {_SEED}: [2, 3, 4]")
    taken = {round(read_number(seed, f"{where}: axes.{_SEED}", int)) for seed in seeds}
    found = Search(
        key,
        named,
        round(read_number(tree.get("keep", 1), f"{where}.keep", int)),
        round(read_number(tree.get("seed"), f"{where}.seed", int)),
        read_number(tree.get("length", 1), f"{where}.length", float),
        round(read_number(tree.get("rounds", 1), f"{where}.rounds", int)),
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
    _check_rounds(found, where)
    return found


def _check_rounds(search: Search, where: str) -> None:
    """Every round has something to leave out, and none is longer than a run."""
    if search.rounds > _MOST_ROUNDS or search.length * 2 ** (search.rounds - 1) > 1:
        raise UserError(
            f"{where}: {search.rounds} rounds, each twice as long as the one before and the first "
            f"{search.length:g} of a run, end beyond the length of a run; give a length of "
            f"{2.0 ** (1 - min(search.rounds, _MOST_ROUNDS)):g} or less, or fewer rounds"
        )
    if search.tried[-1] <= search.keep:
        raise UserError(
            f"{where}: {search.rounds} rounds try {', '.join(map(str, search.tried))} values, and "
            f"{search.keep} are kept: the last has nothing to choose; give fewer rounds, or more "
            f"values"
        )


def _of_finalists(sweep: Sweep) -> Question | None:
    """What is asked, of several finalists one by one: which is best, these seeds may not say.

    Raises:
        UserError: the searched key is compared beside others: not all of them need have the same
            finalists.
    """
    search, question = sweep.search, sweep.compare
    if search is None or question is None or search.keep == 1:
        return question
    if search.key in question.by and len(question.by) > 1:
        raise UserError(
            f"{sweep.path}: compare.by names {search.key}, which is searched, beside other keys, "
            f"and each of their values may have finalists of its own; leave it out: each finalist "
            f"has a table"
        )
    if {search.key, FINALIST} & {*question.by, *question.each}:
        return question
    return replace(question, each=[*question.each, FINALIST])


def _sizes(tree: dict[str, Any], where: str) -> tuple[list[Value], Ladder]:
    check_known(tree, ("parameters", "width_per_layer", "head_dim"), where)
    ladder = Ladder(
        read_number(tree.get("width_per_layer"), f"{where}.width_per_layer", float),
        round(read_number(tree.get("head_dim"), f"{where}.head_dim", int)),
    )
    targets = tree["parameters"]
    if isinstance(targets, list):
        targets = dict.fromkeys(map(as_text, targets))
    if not isinstance(targets, dict) or not targets:
        raise UserError(f"{where}.parameters: write a list such as [100M, 340M]")
    values = [
        Value(
            folder_name(scalars.guess(name)),
            read_keys(keys or {}, f"{where}.parameters.{name}"),
            None,
            read_count(name, where),
        )
        for name, keys in targets.items()
    ]
    return values, ladder


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
