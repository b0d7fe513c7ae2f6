"""The methods against forgetting by name: the one place that knows which there are. No torch.

A method says what the runs under it have otherwise: hooks, another mixture, or nothing. One of this
package takes a function and a line here, and a hook in `nlscale.continual.methods` where it needs
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nlscale.config import schema
from nlscale.config.fields import within
from nlscale.config.vocabulary import ContextObjective, ContextReset
from nlscale.continual.methods.options import (
    EwcOptions,
    FreezeOptions,
    LearnOptions,
    LwfOptions,
)
from nlscale.continual.metrics import LEARN
from nlscale.errors import UserError
from nlscale.train.hooks.options import NoOptions, ReplayOptions

Keys = dict[str, Any]
"""Of a recipe, dotted."""


@dataclass(frozen=True)
class Course:
    """A stream as a method sees it."""

    names: list[str]
    """Of the tasks."""
    mixtures: list[list[dict[str, Any]]]
    """Of each, as `data.mixture` has it: every source with its weight."""
    ends: list[int]
    """The last step of each, counted over the stream."""
    known: bool
    """Whether methods are told of boundaries."""
    levels: list[str]
    """Names of the levels, fastest first."""

    @property
    def lengths(self) -> list[int]:
        """Steps of each task."""
        return [end - begin for begin, end in zip([0, *self.ends], self.ends, strict=False)]

    @property
    def boundaries(self) -> list[int]:
        """The last step of each task that another follows."""
        return self.ends[:-1]


@dataclass(frozen=True)
class Changes:
    """What a run under a method has otherwise than one of the stream without."""

    hooks: tuple[dict[str, Any], ...] = ()
    before_scores: tuple[dict[str, Any], ...] = ()
    """Hooks that are called before tasks are scored at the same step."""
    keys: Keys = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to learn a stream."""

    help: str
    options: type
    """A dataclass."""
    changes: Callable[[Course, Any], Changes]
    """Raises UserError where it needs to know of boundaries and does not, or has no such level."""


@dataclass
class _EwcOptions(EwcOptions):
    """Of the method: when it consolidates as well."""

    level: str | None = None
    """At whose updates; null: at boundaries."""


@dataclass
class _LwfOptions(LwfOptions):
    level: str | None = None
    """At whose updates the old weights are renewed; null: at boundaries."""


@dataclass
class _ReplayOptions(ReplayOptions):
    level: str | None = None
    """At whose updates the buffer is refreshed; null: of the slowest."""


@dataclass
class _FreezeOptions(FreezeOptions):
    after: int = within(1, above=0)
    """Tasks that they learn before."""


@dataclass
class _PeriodsOptions:
    levels: dict[str, Any] = field(default_factory=dict)
    """Of each that is named its period, as a recipe has it, or `task`: the length of one."""


@dataclass
class _ContextOptions(LearnOptions):
    levels: dict[str, Any] = field(default_factory=dict)
    """Of each that is named the keys of its context, of objective ntp."""
    level: str | None = None
    """At whose updates those that are never reset read; null: at the end of each task."""


def _nothing(course: Course, options: Any) -> Changes:
    return Changes()


def _joint(course: Course, options: Any) -> Changes:
    """All tasks at once, each as often as the stream has it."""
    shares: dict[str, float] = {}
    for mixture, begin, end in zip(course.mixtures, [0, *course.ends], course.ends, strict=False):
        whole = sum(source["weight"] for source in mixture)
        for source in mixture:
            part = (end - begin) * source["weight"] / whole
            shares[source["dir"]] = shares.get(source["dir"], 0.0) + part
    mixture = [{"dir": folder, "weight": share} for folder, share in shares.items()]
    return Changes(keys={"data.mixture": mixture, "data.stages": []})


def _replay(course: Course, options: _ReplayOptions) -> Changes:
    level = _level(course, options.level or course.levels[-1])
    return Changes(({"name": "replay", "level": level, "options": _without_level(options)},))


def _at_boundaries(name: str) -> Callable[[Course, Any], Changes]:
    """A hook that is called at boundaries, or at the updates of a level."""

    def changes(course: Course, options: Any) -> Changes:
        given = {"name": name, "options": _without_level(options)}
        if options.level is not None:
            return Changes(({**given, "level": _level(course, options.level)},))
        if not course.known:
            raise UserError(
                f"{name} has to know when a task ends, and boundaries are unknown: name a level "
                f"at whose updates it is called instead, {{{name}: {{level: {course.levels[-1]}}}}}"
            )
        return Changes(({**given, "steps": course.boundaries},))

    return changes


def _freeze(course: Course, options: _FreezeOptions) -> Changes:
    if not options.levels:
        raise UserError(f"freeze: levels: name those to freeze, of {', '.join(course.levels)}")
    for name in options.levels:
        _level(course, name)
    if not course.known:
        raise UserError("freeze has to know when a task ends, and boundaries are unknown")
    if options.after >= len(course.ends):
        raise UserError(
            f"freeze: after {options.after} of {len(course.ends)} tasks nothing is left to learn"
        )
    hook = {"name": "freeze", "steps": [course.ends[options.after - 1]]}
    return Changes(({**hook, "options": {"levels": options.levels}},))


def _periods(course: Course, options: _PeriodsOptions) -> Changes:
    if not options.levels:
        raise UserError(f"levels: give periods of some of {', '.join(course.levels)}")
    keys: Keys = {}
    for name, given in options.levels.items():
        place = course.levels.index(_level(course, name))
        if given == "task":
            if len(set(course.lengths)) > 1:
                raise UserError(
                    f"levels.{name}: tasks have {', '.join(f'{n:,}' for n in course.lengths)} "
                    f"steps, and a period is one of these: give it in steps"
                )
            given = f"{course.lengths[0]} steps"
        keys[f"levels.spectrum.{place}.period"] = given
    return Changes(keys=keys)


def _reset(course: Course, options: Any) -> Changes:
    if not course.known:
        raise UserError("optimizers are reset at boundaries, which are unknown")
    return Changes(({"name": "reset-optimizer", "steps": course.boundaries},))


def _context(course: Course, options: _ContextOptions) -> Changes:
    if not options.levels:
        raise UserError(
            f"levels: give some of {', '.join(course.levels)} a context, such as "
            f"{{{course.levels[-1]}: {{chunk: 64, learning_rate: 0.1}}}}"
        )
    keys: Keys = {}
    never = False
    for name, given in options.levels.items():
        place = course.levels.index(_level(course, name))
        if not isinstance(given, dict) or not given:
            raise UserError(f"levels.{name}: give keys of its context, such as {{chunk: 64}}")
        never = never or given.get("reset") == ContextReset.never.value
        for key, value in {"objective": ContextObjective.ntp.value, **given}.items():
            keys[f"levels.spectrum.{place}.context.{key}"] = value
    hook: dict[str, Any] = {
        "name": LEARN,
        "options": {"sequences": options.sequences},
    }
    if not never:
        return Changes(keys=keys)
    if options.level is not None:
        return Changes(before_scores=({**hook, "level": _level(course, options.level)},), keys=keys)
    if not course.known:
        raise UserError(
            f"levels that are never reset read at the end of each task, and boundaries are "
            f"unknown: name a level at whose updates they do, {{level: {course.levels[-1]}}}"
        )
    return Changes(before_scores=({**hook, "steps": course.ends},), keys=keys)


METHODS: dict[str, Method] = {
    "naive": Method("one task after the other, nothing else", NoOptions, _nothing),
    "joint": Method("all tasks at once: the bound from above", NoOptions, _joint),
    "replay": Method("read samples of before again", _ReplayOptions, _replay),
    "ewc": Method("hold what mattered for earlier tasks", _EwcOptions, _at_boundaries("ewc")),
    "lwf": Method("go on saying on new data what was said", _LwfOptions, _at_boundaries("lwf")),
    "freeze": Method("levels stand still after the first task", _FreezeOptions, _freeze),
    "periods": Method("levels of other periods, up to a task's length", _PeriodsOptions, _periods),
    "reset": Method("optimizers begin anew with each task", NoOptions, _reset),
    "context": Method("levels learn inside the context", _ContextOptions, _context),
}


def changes_of(given: Mapping[str, Any], course: Course, where: str) -> Changes:
    """What methods change together.

    Args:
        given: of each by its name the options, as they were typed.
        course: the stream.
        where: of the file, for errors.

    Raises:
        UserError: no such method or option, one that needs what there is not, or two that change
            the same key.
    """
    both = Changes()
    for name, options in given.items():
        if name not in METHODS:
            raise UserError(
                f"{where}: no method is called {name!r}; {schema.nearest(name, METHODS)}"
            )
        one = METHODS[name]
        kind: schema.Kind[Any] = schema.Kind(
            f"method {name}", one.options, "options of a method", "", "{} not set"
        )
        try:
            new = one.changes(course, schema.build(options or {}, kind, {}))
        except UserError as error:
            raise UserError(f"{where}.{name}: {error}") from None
        both = Changes(
            (*both.hooks, *new.hooks),
            (*both.before_scores, *new.before_scores),
            {**both.keys, **new.keys},
        )
    return both


def _level(course: Course, name: str) -> str:
    if name not in course.levels:
        raise UserError(f"no level is called {name!r}; {schema.nearest(name, course.levels)}")
    return name


def _without_level(options: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key != "level"}
