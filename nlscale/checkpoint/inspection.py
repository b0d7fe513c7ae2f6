"""What `nlscale checkpoint` says of checkpoints: as plain dicts for JSON, and as tables."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.checkpoint.diff import class_of, compare, differing
from nlscale.checkpoint.store.store import LATEST, Checkpoint, CheckpointError, Store
from nlscale.config import recipe
from nlscale.config.curriculum import of_plain, tokens_until
from nlscale.config.pattern import shortened
from nlscale.config.periods import caps_of_plain, changes_of
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Config, LevelConfig
from nlscale.levels.spectrum import SyncGroup

_FILE_WIDTH = 100  # columns, where there is no terminal to ask
_NAMES_SHOWN = 3
_LATEST_BYTES = 80  # far more than a name
_VALUE_WIDTH = 30  # columns of a value in a line of a difference


def listing(checkpoints: list[Checkpoint], begun: list[str]) -> dict[str, Any]:
    """What `find` found, without reading what is large in it.

    Args:
        checkpoints: of one folder, oldest first, at least one.
        begun: names of unfinished ones.

    Returns:
        `folder`; `latest`: the name that LATEST holds, None without it; `checkpoints`, oldest
        first, each `name`, `step`, `created` (UTC), `tokens`, `bytes` and `files` on the disk,
        `latest` (bool) and `error` (why it cannot be read, else None); `unfinished`: names of
        folders that are being written or deleted, or were when a run was killed.
    """
    folder = checkpoints[0].path.parent
    latest = folder / LATEST
    name = (_first_line(latest) or None) if latest.is_file() else None
    return {
        "folder": str(folder),
        "latest": name,
        "checkpoints": [
            {**_summary(checkpoint), "latest": checkpoint.path.name == name}
            for checkpoint in checkpoints
        ],
        "unfinished": begun,
    }


def _first_line(path: Path) -> str:
    """Of a file that may hold anything; empty where it cannot be read."""
    with suppress(OSError):
        lines = path.read_bytes()[:_LATEST_BYTES].decode("ascii", "backslashreplace").split("\n")
        return lines[0].strip()
    return ""


def unfinished(store: Store) -> list[str]:
    """Names of the folders of a store that look like checkpoints and are none."""
    finished = {checkpoint.path.name for checkpoint in store.checkpoints()}
    begun = {path.name for path in store.folder.glob("step-*.*") if path.is_dir()}
    return sorted(begun - finished)


def inspection(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds.

    Returns:
        `path`, `step`, `created` (UTC), `tokens`, `samples` (number of the next), `bytes` and
        `files` on the disk, `layout`, `versions`, `pending`, `wandb_id`; `levels`: each `name`,
        `period` in steps, `groups` (parts that update at other steps), `updates` and `reductions`
        of the group that made most, `window_fill` of the fullest window, 0 to 1, and the `tokens`
        in it; `tensors`: `count`, `elements` and `bytes` of each class; `config`: values by dotted
        key where they are not the defaults.

    Raises:
        CheckpointError: its manifest, state or metadata cannot be read.
    """
    state, summary = checkpoint.state, _summary(checkpoint)
    if summary["error"]:
        raise CheckpointError(summary["error"])
    kept = ("samples", "layout", "versions", "pending", "wandb_id")
    try:
        return _described(checkpoint, state, summary, kept)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the state of {checkpoint.path} is damaged, or of another version: {error!r}"
        ) from None


def _described(
    checkpoint: Checkpoint, state: dict[str, Any], summary: dict[str, Any], kept: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        **{key: value for key, value in summary.items() if key not in ("name", "error")},
        **{key: state[key] for key in kept},
        "levels": _levels(state),
        "tensors": _classes(checkpoint),
        "config": _not_default(state["config"]),
    }


def difference(a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
    """What `compare` returns, and what else differs.

    Returns:
        The keys of `compare`; `a` and `b`: `path` and `step` of each; `config`, `layout`,
        `versions`, `data`: [a, b] by dotted key where they differ.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    states = a.state, b.state
    return {
        "a": {"path": str(a.path), "step": a.step},
        "b": {"path": str(b.path), "step": b.step},
        **compare(a, b),
        **{
            key: differing(*(state.get(key) for state in states))
            for key in ("config", "layout", "versions", "data")
        },
    }


def print_listing(found: dict[str, Any]) -> None:
    """Print the table of `listing`."""
    console = make_console()
    console.print(found["folder"])
    table = _table(("step", "tokens", "size", "files"), ("written", ""))
    for entry in found["checkpoints"]:
        tokens = "?" if entry["tokens"] is None else human_count(entry["tokens"])
        mark = "broken" if entry["error"] else LATEST if entry["latest"] else ""
        cells = f"{entry['step']:,}", tokens, human_bytes(entry["bytes"]), str(entry["files"])
        table.add_row(*cells, _when(entry["created"]), mark)
    console.print(table)
    for entry in found["checkpoints"]:
        if entry["error"]:
            console.print(f"broken: {entry['error']}")
    if not _has_latest(found):
        what = f"names {found['latest']}, which is not there" if found["latest"] else "is missing"
        console.print(f"{LATEST} {what}; a run goes on from the newest that is whole")
    if found["unfinished"]:
        console.print(
            f"unfinished: {', '.join(found['unfinished'])} (being written or deleted, or left by a "
            f"run that was killed)"
        )


def _has_latest(found: dict[str, Any]) -> bool:
    """Whether what LATEST names is there; the folder may be the URL of a mirror."""
    listed = any(entry["latest"] for entry in found["checkpoints"])
    return listed or (
        found["latest"] is not None and (Path(found["folder"]) / found["latest"]).is_dir()
    )


def print_inspection(found: dict[str, Any]) -> None:
    """Print what `inspection` returns."""
    console = make_console()
    layout = found["layout"]
    console.print(found["path"])
    console.print(
        f"step {found['step']:,}, {human_count(found['tokens'])} tokens, next sample "
        f"{found['samples']:,}"
    )
    console.print(
        f"written {_when(found['created'])}, {human_bytes(found['bytes'])} in {found['files']} "
        f"files"
    )
    console.print(
        f"by {_plural(layout['ranks'], 'rank')} on {_plural(layout['nodes'], 'node')}, tensor "
        f"{layout['tensor']}, pipeline {layout['pipeline']}; windows {found['pending']}"
    )
    console.print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    if found["wandb_id"]:
        console.print(f"wandb run {found['wandb_id']}")
    console.print()
    table = _table(("period", "updates", "reductions", "window"), first="level")
    for level in found["levels"]:
        fill = f"{100 * level['window_fill']:.0f}%" if level["tokens"] else "empty"
        counts = (f"{level[key]:,}" for key in ("period", "updates", "reductions"))
        table.add_row(level["name"], *counts, fill)
    console.print(table)
    console.print()
    table = _table(("tensors", "elements", "bytes"), first="class")
    for kind, sums in found["tensors"].items():
        cells = f"{sums['count']:,}", human_count(sums["elements"]), human_bytes(sums["bytes"])
        table.add_row(kind, *cells)
    console.print(table)
    console.print()
    console.print("not the defaults:")
    for key, value in found["config"].items():
        console.print(f"  {key}: {_plain(value)}")


def print_difference(found: dict[str, Any]) -> None:
    """Print what `difference` returns."""
    console = make_console()
    for side in ("a", "b"):
        console.print(f"{side}  {found[side]['path']} (step {found[side]['step']:,})")
    console.print()
    table = _table((), ("equal", "differs by", "where"), first="class")
    for kind, entry in found["classes"].items():
        equal = "bitwise" if entry["bitwise"] else "no"
        if "differs" in entry:
            table.add_row(kind, equal, "", _shortened(entry["differs"]))
            continue
        largest = entry["max_relative_difference"]
        by = "" if entry["bitwise"] else f"{largest:.2g}" if math.isfinite(largest) else "-"
        table.add_row(kind, equal, by, entry["worst"] or "")
    console.print(table)
    if not found["bitwise"]:
        console.print("differs by: |a - b| / |b| of the tensor, or losses, where that is largest")
    for kind, entry in found["classes"].items():
        if entry.get("unlike"):
            console.print(
                f"{kind} of one side only, or of another shape: {_shortened(entry['unlike'])}"
            )
    for section in ("config", "layout", "versions", "data"):
        if found[section]:
            console.print(f"\n{section}, a -> b:")
        for key, (a, b) in found[section].items():
            console.print(f"  {key}: {_plain(a)} -> {_plain(b)}")


def make_console() -> Console:
    """Of standard output; lines are not broken where it is not a terminal."""
    # Paths hold brackets and numbers: no markup, no colours guessed from the text.
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    return Console(markup=False, highlight=False, soft_wrap=True, width=width)


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    sizes = _sizes(checkpoint.path)
    summary: dict[str, Any] = {
        "name": checkpoint.path.name,
        "step": checkpoint.step,
        "created": None,
        "tokens": None,
        "bytes": sum(sizes),
        "files": len(sizes),
        "error": None,
    }
    try:
        summary["created"] = checkpoint.manifest["created"]
        summary["tokens"] = checkpoint.state["tokens"]
    except CheckpointError as error:
        summary["error"] = str(error)
    except KeyError as error:
        summary["error"] = f"{checkpoint.path} is damaged: it does not say its {error.args[0]}"
    return summary


def _sizes(folder: Path) -> list[int]:
    """Bytes of each file; a run may be deleting the checkpoint meanwhile."""
    sizes = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if path.is_file():
                    sizes.append(path.stat().st_size)
    return sizes


def _levels(state: dict[str, Any]) -> list[dict[str, Any]]:
    config = state["config"]
    stages = of_plain(config)
    until = partial(tokens_until, stages)
    longest = max(group["period"] for group in state["levels"])
    caps = caps_of_plain(config["levels"], stages, longest)
    levels = []
    for index, declared in enumerate(config["levels"]["spectrum"]):
        groups = [group for group in state["levels"] if group["level"] == index]
        period = max(group["period"] for group in groups)
        tokens = max(group["tokens"] for group in groups)
        fills = [
            group["tokens"]
            / SyncGroup(
                index,
                group["phase"],
                group["period"],
                changes=changes_of(caps, config["train"]["steps"], group["period"]),
            ).window_tokens(state["step"], until)
            for group in groups
        ]
        levels.append(
            {
                "name": declared["name"],
                "period": period,
                "groups": len(groups),
                "updates": max(group["updates"] for group in groups),
                "reductions": max(group["reductions"] for group in groups),
                "window_fill": max(fills),
                "tokens": tokens,
            }
        )
    return levels


def _classes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    classes: dict[str, dict[str, int]] = {}
    for name, info in checkpoint.tensors().items():
        sums = classes.setdefault(class_of(name), {"count": 0, "elements": 0, "bytes": 0})
        sums["count"] += 1
        sums["elements"] += math.prod(info.shape)
        sums["bytes"] += info.bytes
    return classes


def _not_default(config: dict[str, Any]) -> dict[str, Any]:
    defaults = recipe.to_plain(Config())
    levels = config["levels"]["spectrum"]
    defaults["levels"]["spectrum"] = [recipe.to_plain(LevelConfig()) for _ in levels]
    model = config["model"]
    short = shortened(model)
    if not short:
        defaults["model"]["memory"].update(MIXER_PRESETS.get(model["mixer"], {}))
    config = config | {"model": model | {"pattern": []}}
    found = {key: value for key, (_, value) in differing(defaults, config).items()}
    return found | ({"model.pattern": short} if short else {})


def _table(
    numbers: tuple[str, ...], texts: tuple[str, ...] = (), first: str | None = None
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    if first is not None:
        table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for column in texts:
        table.add_column(column, overflow="fold")
    return table


def _when(created: str | None) -> str:
    """`2025-11-21T11:49:07Z` as a person writes it."""
    return "?" if created is None else f"{created[:10]} {created[11:16]} UTC"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _shortened(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _plain(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _VALUE_WIDTH else f"{text[:_VALUE_WIDTH]}..."
