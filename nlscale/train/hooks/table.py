"""The hooks by name: the one place that knows which there are. No torch is imported.

A hook of nlscale takes its file and a line here. A module of your own calls `register` when it is
imported; a recipe names it in `run.imports`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from nlscale.config import schema
from nlscale.config.scalars import Plain
from nlscale.config.vocabulary import Config, HookConfig
from nlscale.errors import UserError
from nlscale.train.hooks.options import AverageOptions, EvaluateOptions, NoOptions, ReplayOptions


@dataclass(frozen=True)
class _Known:
    """A hook that a recipe can name."""

    made_by: str | type[Any]
    """The class, a `nlscale.train.hooks.hook.Hook`; or `package.module:Class`, imported when a run
    begins."""
    options: type
    """A dataclass."""
    one_length: bool

    def read(self, given: HookConfig, at: str) -> Any:
        """Its options, checked.

        Raises:
            UserError: it has none of that name, or a value is none.
        """
        kind: schema.Kind[Any] = schema.Kind(
            f"hook {given.name}",
            self.options,
            "options of a hook",
            folder="",
            unset="{} not set",
            interpolates=True,  # lists of sections are made by what does that
        )
        try:
            return schema.build(_typed(given.options), kind, {})
        except UserError as error:
            raise UserError(f"{at}.options ({given.name}): {error}") from None

    def load(self) -> type[Any]:
        if not isinstance(self.made_by, str):
            return self.made_by
        module, _, name = self.made_by.partition(":")
        found: type[Any] = getattr(importlib.import_module(module), name)
        return found


_TABLE: dict[str, _Known] = {
    "average": _Known("nlscale.train.hooks.average:Average", AverageOptions, False),
    "evaluate": _Known("nlscale.train.hooks.evaluate:Evaluate", EvaluateOptions, False),
    "replay": _Known("nlscale.train.hooks.refresh:Refresh", ReplayOptions, True),
}


def register(
    name: str,
    made_by: str | type[Any],
    options: type | None = None,
    one_length: bool | None = None,
) -> None:
    """Add a hook, which `hooks` can name from then on.

    Args:
        name: of it.
        made_by: its class, a `Hook`; or `package.module:Class`, imported when a run begins, with
            its `options` and `one_length` beside it.
        options: of such a one, the dataclass of its options.
        one_length: likewise, see `Hook.one_length`.

    Raises:
        UserError: the name is taken.
    """
    if name in _TABLE:
        raise UserError(f"a hook is called {name!r} already; give yours another name")
    if not isinstance(made_by, str):
        options, one_length = options or made_by.Options, made_by.one_length
    _TABLE[name] = _Known(made_by, options or NoOptions, bool(one_length))


def known(name: str) -> _Known:
    """The hook of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _TABLE:
        raise UserError(
            f"no hook is called {name!r}; {schema.nearest(name, _TABLE)}; --import the module that "
            f"adds another"
        )
    return _TABLE[name]


def check(config: Config, lengths: int) -> None:
    """Refuse hooks that cannot be called.

    Args:
        config: of the run.
        lengths: how many lengths its sequences have.

    Raises:
        UserError: no hook of a name, one named twice, a level or step that the run has not, an
            option that is none; which entry.
    """
    levels, seen = [level.name for level in config.levels.spectrum], set()
    for index, given in enumerate(config.hooks):
        at = f"hooks.{index}"
        try:
            one = known(given.name)
        except UserError as error:
            raise UserError(f"{at}.name: {error}") from None
        one.read(given, at)
        if given.name in seen:
            raise UserError(f"{at}: {given.name!r} is there twice; a run has one hook of a name")
        seen.add(given.name)
        if given.level is not None and given.level not in levels:
            raise UserError(
                f"{at}.level: no level is called {given.level!r}; "
                f"{schema.nearest(given.level, levels)}"
            )
        late = [step for step in given.steps if step > config.train.steps]
        if late:
            raise UserError(
                f"{at}.steps: step {late[0]:,} comes after the end, train.steps="
                f"{config.train.steps:,}"
            )
        if one.one_length and lengths > 1:
            raise UserError(
                f"{at}: {given.name} goes by the numbers of samples, and sequences of this run "
                f"have {lengths} lengths; leave out data.stages with another sequence_length"
            )


def _typed(value: Any) -> Any:
    """Texts as they were typed, whose type the option decides."""
    if isinstance(value, dict):
        return {name: _typed(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_typed(each) for each in value]
    return Plain(value) if value is not None else None
