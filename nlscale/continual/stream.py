"""A stream file: reading it, and the runs that it stands for. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nlscale.config import recipe, schema, trees
from nlscale.config.curriculum import tokens_per_step
from nlscale.config.fields import one_of, within
from nlscale.config.fields import path as path_field
from nlscale.config.in_context import in_context
from nlscale.config.scalars import shown
from nlscale.config.vocabulary import Config, ContextObjective, ContextReset
from nlscale.continual.methods.table import METHODS, Course, changes_of
from nlscale.continual.metrics import LEARN, METRICS, RECORD, Metric
from nlscale.errors import UserError
from nlscale.scaling.sweep.spec import Sweep, commands
from nlscale.scaling.sweep.values import Value, folder_name, read_count, read_keys

METHOD, SEED = "method", "run.seed"
"""The axes of a stream's runs."""
_MODULE = "nlscale.continual.methods"
_OURS = ("data.dir", "data.mixture", "data.stages", "data.temperature", "train.steps", SEED)
"""Keys that a stream sets itself, beside those of every sweep."""
_EVERYONES = ("hooks", "run.imports", "data.sequence_length", "train.global_batch")
"""Keys that all runs of a stream have alike."""


@dataclass
class _Task:
    """The keys of a task."""

    data: Any = MISSING
    steps: int | None = within(None, above=0)
    tokens: str | None = None


@dataclass
class _Source:
    """A data folder of a task."""

    dir: str = path_field(url=True)
    weight: float = within(1.0, above=0)


@dataclass
class _File:
    """The keys of a stream file."""

    recipe: str = path_field()
    dir: str = path_field()
    set: Any = None
    tasks: Any = MISSING
    methods: Any = MISSING
    seeds: list[int] = within([], least=0)
    boundaries: str = one_of(["known", "unknown"])
    optimizer: str = one_of(["kept", "reset"])
    metric: str = one_of(list(METRICS))
    every: int | None = within(None, above=0)
    workers: int | None = within(None, above=0, most=4096)
    ranks: int = within(1, above=0, most=4096)
    build_data: Any = ""


_STREAM = schema.Kind(
    name="stream file",
    schema=_File,
    form=f"a stream is a mapping of {', '.join(each.name for each in fields(_File))}",
    folder="recipes/streams",
    unset="{} not set; see recipes/streams",
)


@dataclass(frozen=True)
class Stream:
    """A stream file, read."""

    sweep: Sweep
    """Its runs: every method with every seed."""
    tasks: list[str]
    ends: list[int]
    """The last step of each task, counted over the stream."""
    methods: list[str]
    """Names under which the runs of each are found on the axis `METHOD`; the first is what the
    others are compared with."""
    metric: Metric
    metric_name: str
    helps: dict[str, str] = field(default_factory=dict)
    """What each method consists of, in words."""

    @property
    def path(self) -> Path:
        return self.sweep.path


def read_stream(given: str | Path, imports: list[str] | None = None) -> Stream:
    """Read and check a stream file, by its path or name.

    Args:
        given: path or name.
        imports: modules that its runs import beside those it names.

    Raises:
        UserError: no such file, not YAML, an unknown or missing key, fewer than two tasks, no
            method, or what a method needs and has not.
    """
    tree, sources = schema.read(given, _STREAM)
    path = Path(sources[""])
    file = schema.build(tree, _STREAM, sources)
    common = _keys(file.set or {}, f"{path}: set", _OURS)
    own = common.pop("run.imports", None) or []
    common["run.imports"] = [*own, *(imports or []), _MODULE]
    hooks = common.pop("hooks", None) or []
    mixtures, ends = _tasks(file, common, path)
    names = list(mixtures)
    scores = {
        "name": RECORD,
        "steps": _scored(ends, file.every),
        "options": {
            "metric": file.metric,
            "tasks": [{"name": name, "sources": mixtures[name]} for name in names],
        },
    }
    hooks = [scores, *hooks]
    if file.optimizer == "reset":
        if file.boundaries == "unknown":
            raise UserError(
                f"{path}: optimizer: reset is at boundaries, which are unknown; keep it, or let "
                f"boundaries be known"
            )
        hooks.append({"name": "reset-optimizer", "steps": ends[:-1]})
    common |= {
        "data.dir": None,
        "data.mixture": mixtures[names[0]],
        "data.stages": [
            {"from": f"{end} steps", "mixture": mixtures[name]}
            for name, end in zip(names[1:], ends[:-1], strict=True)
        ],
        "train.steps": ends[-1],
        "checkpoint.steps": ends[:-1],
    }
    values, helps = [], {}
    for name, entry in _methods(file.methods, path).items():
        where = f"{path}: methods.{name}"
        keys = _keys(entry.get("set") or {}, f"{where}.set", (*_OURS, *_EVERYONES))
        given_methods = {key: value for key, value in entry.items() if key != "set"}
        config = _load(file.recipe, {**common, **keys}, path)
        course = Course(
            names=names,
            mixtures=[mixtures[task] for task in names],
            ends=ends,
            known=file.boundaries == "known",
            levels=[level.name for level in config.levels.spectrum],
        )
        made = changes_of(given_methods, course, where)
        of_run = [*made.before_scores, *hooks, *made.hooks]
        _check_never(config, of_run, where)
        values.append(Value(folder_name(name), {"hooks": of_run, **keys, **made.keys}))
        helps[values[-1].name] = ", ".join(
            [*given_methods, *(f"{key}={trees.dump(value)}" for key, value in keys.items())]
        )
    if len({value.name for value in values}) < len(values):
        raise UserError(f"{path}: methods: two are called alike; rename one")
    seeds = file.seeds or [Config().run.seed]
    sweep = Sweep(
        path=path,
        recipe=file.recipe,
        folder=Path(file.dir),
        common=common,
        axes={METHOD: values, SEED: [Value(f"seed{seed}", {SEED: seed}) for seed in seeds]},
        workers=file.workers,
        ranks=file.ranks,
        build_data=commands(file.build_data, f"{path}: build_data"),
    )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: one is there twice")
    found = [value.name for value in values]
    return Stream(sweep, names, ends, found, METRICS[file.metric], file.metric, helps)


def _check_never(config: Config, hooks: list[Any], where: str) -> None:
    """Raises UserError: a level is never reset, and nothing has it read what it could keep."""
    if any(isinstance(hook, dict) and hook.get("name") == LEARN for hook in hooks):
        return
    for level in in_context(config, ContextObjective.ntp):
        if level.keys.reset == ContextReset.never:
            name = config.levels.spectrum[level.level].name
            raise UserError(
                f"{where}: level {name!r} is never reset, and nothing has it read: give its "
                f"context to the method of that name, {{context: {{levels: {{{name}: ...}}}}}}"
            )


def _keys(tree: Any, where: str, ours: tuple[str, ...]) -> dict[str, Any]:
    """Keys of a recipe, without those that a stream sets itself."""
    keys = read_keys(tree, where)
    for key in keys:
        if any(key == own or key.startswith(f"{own}.") for own in ours):
            raise UserError(f"{where}: {key} is what a stream sets itself, for all its runs alike")
    return keys


def _tasks(
    file: _File, common: Mapping[str, Any], path: Path
) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """The mixture of each task, and its last step."""
    if not isinstance(file.tasks, dict) or len(file.tasks) < 2:
        raise UserError(
            f"{path}: tasks: a stream has two or more, in their order, such as "
            f"{{en: {{data: data/en, steps: 200}}, de: {{data: data/de, steps: 200}}}}"
        )
    mixtures: dict[str, list[dict[str, Any]]] = {}
    lengths: list[int] = []
    for name, tree in file.tasks.items():
        where = f"{path}: tasks.{name}"
        if "/" in str(name):
            raise UserError(f"{where}: a name without a slash, such as {str(name).split('/')[-1]}")
        kind = schema.Kind("task", _Task, "a task is {data: ..., steps: ...}", "", "{} not set")
        try:
            task = schema.build(tree, kind, {})
            mixtures[str(name)] = _sources(task.data)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if (task.steps is None) == (task.tokens is None):
            raise UserError(f"{where}: give its steps, or its tokens such as 1M, and not both")
        steps = task.steps or 0
        if task.tokens is not None:
            config = _load(file.recipe, {**common, "data.dir": "none"}, path)
            each = tokens_per_step(config)
            if each is None:
                raise UserError(f"{where}: a step has not always as many tokens; give its steps")
            steps = round(read_count(task.tokens, f"{where}.tokens") / each)
            if not steps:
                raise UserError(f"{where}: {task.tokens} tokens are less than a step of {each:,}")
        lengths.append(steps)
    return mixtures, list(accumulate(lengths))


def _sources(data: Any) -> list[dict[str, Any]]:
    """As `data.mixture` has them."""
    given = data if isinstance(data, list) else [{"dir": data}]
    kind = schema.Kind("source", _Source, "a source is {dir: ..., weight: ...}", "", "{} not set")
    if not given:
        raise UserError("data: name a folder")
    return [vars(schema.build(each, kind, {})) for each in given]


def _methods(tree: Any, path: Path) -> dict[str, dict[str, Any]]:
    """What each name stands for; alone, the method of that name."""
    if isinstance(tree, list):
        tree = dict.fromkeys(map(str, tree))
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"{path}: methods: name some, such as {{naive: , ewc: {{ewc: {{strength: 10}}}}}}; "
            f"there are {', '.join(METHODS)}"
        )
    found = {}
    for name, entry in tree.items():
        if entry is not None and not isinstance(entry, dict):
            raise UserError(
                f"{path}: methods.{name} is {shown(entry)}; write {{METHOD: {{OPTION: value}}}}, "
                f"and keys of its own under set"
            )
        found[str(name)] = {str(key): value for key, value in (entry or {name: None}).items()}
    return found


def _scored(ends: list[int], every: int | None) -> list[int]:
    """Steps after which all tasks are scored."""
    between = range(every, ends[-1], every) if every else ()
    return sorted({*ends, *between})


def _load(given: str, keys: Mapping[str, Any], path: Path) -> Config:
    overrides = [f"{key}={trees.dump(value)}" for key, value in keys.items()]
    try:
        return recipe.load(given, overrides, trusted=True).config
    except UserError as error:
        raise UserError(f"{path}: {str(error).replace(' (the command line)', '')}") from None
