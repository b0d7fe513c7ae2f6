"""The page of every key: of recipes, cluster files and sweep files, read off their classes."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from nlscale.cluster.machines import Cluster
from nlscale.config.fields import Range
from nlscale.config.keys import (
    choices_of,
    class_doc,
    field_docs,
    hints_of,
    item_of,
    key_of,
    to_plain,
)
from nlscale.config.pages import page_of
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.recipe import has_key
from nlscale.config.vocabulary import Config, MemoryConfig
from nlscale.scaling.sweep.spec import _File

_WORDS: Mapping[Any, str] = {int: "integer", float: "number", bool: "true or false", str: "text"}

# A sweep file has a grammar of its own, which is more than a type.
_SWEEP = {
    "recipe": (
        "path",
        "The recipe of all runs: a path, or the name of one that comes with nlscale.",
    ),
    "dir": ("path", "Folder of the sweep; each of its runs has a folder in it."),
    "set": (
        "mapping of keys",
        "Keys that all runs set otherwise than the recipe, dotted or nested. Those that a sweep "
        "sets itself are refused: `run.dir`, `run.purpose`, `resume.start`, `checkpoint.steps`, "
        "`checkpoint.keep_every`.",
    ),
    "axes": (
        "mapping",
        "What the runs differ in: there is one for each combination of their values. An axis is "
        "called after a key and lists its values (`model.mixer: [hope, attention]`); or it has a "
        "name of its own and gives its values names, each with keys (`small: {model.d_model: 64}`)."
        " Two names mean something else, `tokens` and `size`.",
    ),
    "workers": (
        "integer or null",
        "Runs at a time on one machine; null: one for each GPU, or for each core.",
    ),
    "ranks": (
        "integer",
        "Processes of each run, on one machine, with a GPU each where there are any. With "
        "`parallel.ranks_per_node: 1` among the keys that are set, each counts as a node.",
    ),
    "build_data": (
        "text or list",
        "The commands that make the data, which are named where there are none; `--build-data` "
        "runs them.",
    ),
    "compare": (
        "mapping or null",
        "What is asked of the runs when all have finished: `by`, `each`, `metric`, `baseline` and "
        "`effect`, as the options of [`nlscale compare`](../how-to/compare.md) mean them.",
    ),
    "search": (
        "mapping or null",
        "A setting that is chosen first: `key` and `values`, each tried on one `seed` at `length` "
        "(1) of a run; the best `keep` (1) are run on the seeds of the axis `run.seed`. See "
        "[compare runs](../how-to/compare.md#settings-that-were-chosen).",
    ),
}
_SWEEP_AXES = """
### axes.tokens { #sweep.axes.tokens }

Length of a run, in place of `train.steps`: a list of budgets (`[750k, 1.5M]`), or
`{per_parameter: [5, 10, 20]}`, tokens for each parameter of the model.

### axes.size { #sweep.axes.size }

Sizes of the model, in place of `model.layers`, `model.d_model` and `model.heads`, as a ladder:

- `parameters`: the sizes, a list such as `[100M, 340M]`, or a mapping from these to further keys of
  the runs of that size,
- `width_per_layer`: `model.d_model` over `model.layers`,
- `head_dim`: of a head; `model.d_model` is a multiple of it.

Of the models of that rule each size is the one that comes closest. Where that is more than 25 %
away, the sweep is refused.
"""

_INTRODUCTION = """---
search:
  boost: 2
---

# Keys

Every key of a recipe, then those of a [cluster file](#cluster) and of a [sweep file](#sweep).

A recipe is a YAML file of these keys; `key=value` on the command line overrides them. Where
`N` stands in a key, it is the index into a list. What null means is said with the key.

The type of a key says what the characters mean:

- *text* is what was typed: `wandb.name=007` is no number and `12:30` no time. `null` is no text;
  quotes around the whole are taken off. On the command line `#` begins no comment.
- a *path* is a text; `~` is the home. What names a service (`s3://...`) or a variable that no
  shell has expanded is refused.
- an *integer* is written in decimal digits (`1_000_000` may be); one that begins with a zero is
  refused. A *number* may be `3e-4`. Both are held against the range that stands with the key.
- *true or false* may also be yes, no, on, off, 1, 0.
`nlscale config --keys` prints the same, and `nlscale config RECIPE --explain KEY` says what value a
key has in a recipe, and where that came from.
"""


def page() -> str:
    """The page in Markdown."""
    described = {f.name for f in fields(_File)}
    if described != _SWEEP.keys():
        raise ValueError(
            f"keys of a sweep file that are not described: {described ^ _SWEEP.keys()}"
        )
    return "\n".join([_INTRODUCTION, *_recipe(), *_cluster(), *_sweep()])


def anchors() -> list[str]:
    """The anchor of every key, in order."""
    return re.findall(r"^###? .* \{ #(\S+)", page(), re.MULTILINE)


def _recipe() -> Iterator[str]:
    yield "## Top level { #top }\n"
    yield from _keys(Config, "", "")


def _cluster() -> Iterator[str]:
    yield (
        "## Cluster files { #cluster }\n\nThe machines of `--cluster`, a YAML file of these keys; "
        "`nlscale recipe list` names those that come with nlscale.\n"
    )
    yield from _keys(Cluster, "", "cluster.")


def _keys(schema: type, prefix: str, anchor: str) -> Iterator[str]:
    """The keys of a section; then the sections in it, each under a heading of its own."""
    inner = []
    for f in fields(schema):
        hint, meaning = _hint(schema, f), field_docs(schema)[key_of(f)]
        name, under = f"{prefix}{key_of(f)}", f"{anchor}{key_of(f)}"
        item = typing.cast(type, item_of(hint))
        if not is_dataclass(hint):
            yield _key(schema, f, name, under)
        if is_dataclass(hint):
            inner.append((item, name, under, meaning))
        elif is_dataclass(item):
            inner.append((item, f"{name}.N", f"{under}.N", class_doc(item)))
    for section, name, under, meaning in inner:
        yield f"## {name} {{ #{under} }}\n\n{_linked(meaning)}\n"
        yield from [_presets()] if section is MemoryConfig else []
        yield from _keys(section, f"{name}.", f"{under}.")


def _sweep() -> Iterator[str]:
    yield "## Sweep files { #sweep }\n\nWhat `nlscale sweep` runs, a YAML file of these keys.\n"
    for f in fields(_File):
        kind, meaning = _SWEEP[f.name]
        yield _entry(f.name, f"sweep.{f.name}", kind, _default(f), [], meaning)
    yield _SWEEP_AXES


def _key(schema: type, f: Field[Any], name: str, anchor: str) -> str:
    hint = _hint(schema, f)
    choices = choices_of(item_of(_without_null(hint)), f)
    meaning = field_docs(schema)[key_of(f)]
    if has_key(anchor):
        meaning += f" {_more(anchor)}"
    kind = _type(hint)
    if "or_list_of" in f.metadata:
        kind = f"{_type(int)} or {kind}"
    if f.metadata.get("path"):
        kind = kind.replace("text", "path")
    return _entry(name, anchor, kind, _default(f), choices, meaning, f.metadata.get("range"))


def _entry(
    name: str,
    anchor: str,
    kind: str,
    default: str,
    choices: list[str],
    meaning: str,
    wanted: Range | None = None,
) -> str:
    notes = [kind, default if default == "required" else f"default `{default}`"]
    if choices:
        notes.append(f"one of {', '.join(f'`{choice}`' for choice in choices)}")
    if wanted is not None:
        notes.append(str(wanted))
    heading = f"### {name} {{ #{anchor} }}"
    return f"{heading}\n\n{' · '.join(notes)}\n{{ .key-type }}\n\n{_linked(meaning)}\n"


def _more(key: str) -> str:
    """The page that says more of a key of a recipe."""
    page = page_of(key).removeprefix("docs/")
    name = (page.partition("#")[2] or Path(page).stem).replace("-", " ")
    return f"More: [{name}](../{page})."


def _presets() -> str:
    """What null stands for, by mixer."""
    names = list(dict.fromkeys(name for preset in MIXER_PRESETS.values() for name in preset))
    rows = [
        f"| `{name}` | {' | '.join(_shown(preset[name]) for preset in MIXER_PRESETS.values())} |"
        for name in names
    ]
    mixers = " | ".join(f"`{mixer}`" for mixer in MIXER_PRESETS)
    rule = " | ".join("---" for _ in MIXER_PRESETS)
    return "\n".join([f"| null means | {mixers} |", f"| --- | {rule} |", *rows, ""])


def _hint(schema: type, f: Field[Any]) -> Any:
    return hints_of(schema)[key_of(f)]


def _without_null(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (each for each in typing.get_args(hint) if each is not type(None))
    return hint


def _type(hint: Any) -> str:
    plain = _without_null(hint)
    item = item_of(plain)
    if typing.get_origin(plain) is list:
        words = f"list of {_plural(item)}"
    elif typing.get_origin(plain) is dict:
        words = "mapping of names to texts"
    else:
        words = "text" if issubclass(plain, Enum) else _WORDS[plain]
    return words if plain is hint else f"{words} or null"


def _plural(item: Any) -> str:
    if is_dataclass(item):
        return "sections"
    return "texts" if issubclass(item, Enum) else f"{_WORDS[item]}s"


def _default(f: Field[Any]) -> str:
    value = f.default if f.default_factory is NO_DEFAULT else f.default_factory()
    return "required" if value == MISSING else _shown(to_plain(value))


def _shown(value: Any) -> str:
    """A value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...")


def _linked(meaning: str) -> str:
    """Pages of the documentation that a docstring names, as links."""
    return re.sub(r"docs/([\w-]+/[\w-]+)\.md(#[\w.-]+)?", r"[\g<0>](../\1.md\2)", meaning)
