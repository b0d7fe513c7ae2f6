"""What lies in run.dir before a run begins there: may it, where does it stand, what is kept.

Nothing is written before all of it is known, and what is not this run's is refused as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nlscale.checkpoint.resume import check_start
from nlscale.checkpoint.same_run import (
    OtherSettings,
    changed_data,
    changed_keys,
    changed_sources,
    check_same_run,
    stable_end,
)
from nlscale.checkpoint.store.store import Checkpoint, CheckpointError, Store
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.telemetry.figures import LOSS_FIGURE, METRICS_FILE, SUMMARY_FILE
from nlscale.train.folder import CONFIG_FILE, read_summary

_HEADER = b"# Resolved configuration"
_SECTIONS = {"run", "data", "model", "levels", "optimizer", "train"}
_OURS = (METRICS_FILE, SUMMARY_FILE, LOSS_FIGURE)
"""What a run replaces or goes on with."""


@dataclass
class Found:
    """What lies there, of a run that may begin or go on."""

    summary: dict[str, Any] | None = None
    """Of this very run, which has finished; there is nothing to do."""
    kept: dict[str, str] = field(default_factory=dict)
    """Names of files, and the names under which they are kept from being replaced."""
    notes: list[str] = field(default_factory=list)
    """What to say of it."""
    warnings: list[str] = field(default_factory=list)
    """What to warn of."""


def look(config: Config, data: dict[str, Any], run_dir: Path, store: Store) -> Found:
    """See what lies in a run's folder, reading only.

    Args:
        config: of the run.
        data: what identifies its data.
        run_dir: its folder, which may be missing.
        store: of its checkpoints.

    Raises:
        UserError: what lies there is another run's or nobody's that nlscale knows, is damaged
            beyond going on, or leaves nothing to do; one line says which, and what to do.
    """
    try:
        return _look(config, data, run_dir, store)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or run_dir}: {error.strerror}") from None


def _look(config: Config, data: dict[str, Any], run_dir: Path, store: Store) -> Found:
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir {run_dir} is a file; give another run.dir")
    found = Found()
    checkpoints = store.checkpoints()
    written = _written(run_dir, bool(checkpoints), found)
    if written is None and not checkpoints:
        _refuse_strangers(run_dir)
        check_start(config, data)
        return found
    newest = _newest(store, checkpoints)
    summary = _summary(run_dir, bool(checkpoints), found)
    if summary is not None and not (written is None and newest is None):
        _finished(config, data, run_dir, written, summary, newest, found)
    elif newest is not None:
        check_same_run(config, data, newest[1], str(newest[0].path))
    elif written is not None and not checkpoints:
        _refuse_another(config, written, run_dir)
        check_start(config, data)
        found.kept[LOSS_FIGURE] = _renamed(LOSS_FIGURE, "before")
    return found


def make_room(found: Found, run_dir: Path) -> None:
    """Give what is to be kept its other name.

    Raises:
        UserError: the folder cannot be written.
    """
    for name, other in found.kept.items():
        path = run_dir / name
        if not path.exists():
            continue
        target, number = run_dir / other, 2
        while target.exists():
            target, number = run_dir / _renamed(other, str(number)), number + 1
        try:
            path.rename(target)
        except OSError as error:
            raise UserError(f"cannot rename {path} to {target}: {error.strerror}") from None
        found.notes.append(f"{path} of before is kept as {target.name}")


def _written(run_dir: Path, has_checkpoints: bool, found: Found) -> dict[str, Any] | None:
    """What config.yaml holds, as plain dicts; None: there is none, or it is damaged and, because
    of checkpoints or as nothing else is there, not needed."""
    path = run_dir / CONFIG_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if content.strip() and not content.startswith(_HEADER):
        raise UserError(
            f"{path} is not one that nlscale wrote, and a run would replace it; move it away, or "
            f"give another run.dir"
        )
    plain = None
    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        plain = yaml.safe_load(content)
    if isinstance(plain, dict) and plain.keys() >= _SECTIONS:
        return plain
    if not has_checkpoints and any(map(_holds_something, (run_dir / n for n in _OURS))):
        raise UserError(
            f"{path} is damaged, and no checkpoint says which run the records beside it are of; "
            f"mend it, or give another run.dir"
        )
    found.kept[CONFIG_FILE] = _renamed(CONFIG_FILE, "damaged")
    found.warnings.append(f"{path} is damaged, and is written anew")
    return None


def _refuse_strangers(run_dir: Path) -> None:
    for name in _OURS:
        if _holds_something(run_dir / name):
            raise UserError(
                f"{run_dir} holds a {name}, and neither a {CONFIG_FILE} nor checkpoints that say "
                f"of which run; move it away, or give another run.dir"
            )


def _summary(run_dir: Path, has_checkpoints: bool, found: Found) -> dict[str, Any] | None:
    """Of a run that has finished; where it is damaged, the checkpoints make it again."""
    path = run_dir / SUMMARY_FILE
    try:
        return read_summary(path)
    except UserError as error:
        if not has_checkpoints:
            raise UserError(
                f"{error}; no checkpoint is left to make it again from: give another run.dir"
            ) from None
        found.kept[SUMMARY_FILE] = _renamed(SUMMARY_FILE, "damaged")
        found.warnings.append(
            f"{error}; the run counts as not finished and goes on from its checkpoints, "
            f"and the summary is written again"
        )
        return None


def _newest(
    store: Store, checkpoints: list[Checkpoint]
) -> tuple[Checkpoint, dict[str, Any]] | None:
    """The newest checkpoint whose state can be read, None where there are none at all.

    Which one is whole is seen when one is loaded.

    Raises:
        CheckpointError: there are checkpoints, and none says of which run it is.
    """
    broken = []
    for checkpoint in reversed(checkpoints):
        try:
            return checkpoint, checkpoint.state
        except CheckpointError as error:
            broken.append(str(error))
    if broken:
        raise CheckpointError(
            f"none of the {len(broken)} checkpoints in {store.folder} is whole: "
            f"{'; '.join(broken)}; restore one, take them away to begin anew, or give another "
            f"run.dir"
        )
    return None


def _refuse_another(config: Config, written: dict[str, Any], run_dir: Path) -> None:
    """Of a run that has no checkpoint yet: its records would go, so it has to be this one."""
    changed = changed_keys(config, written) | changed_sources(config, written)
    refused = {key: both for key, both in changed.items() if key not in config.resume.allow}
    if refused:
        raise UserError(
            f"{run_dir} holds another run, which has no checkpoint yet: {_shown(refused)}; give "
            f"another run.dir, or begin anew with the change, which keeps its records in another "
            f"file: 'resume.allow=[{','.join(refused)}]'"
        )


def _finished(
    config: Config,
    data: dict[str, Any],
    run_dir: Path,
    written: dict[str, Any] | None,
    summary: dict[str, Any],
    newest: tuple[Checkpoint, dict[str, Any]] | None,
    found: Found,
) -> None:
    """Of a run with a summary: is it this one; if it is to be longer, may it go on."""
    state = newest[1] if newest is not None else {}
    changed = changed_keys(config, written if written is not None else state.get("config", {}))
    if state:
        changed |= changed_data(data, state.get("data"))
    elif written is not None:
        changed |= changed_sources(config, written)
    if not changed:
        found.summary = summary
        return
    before, now = changed.get("train.steps", (config.train.steps, config.train.steps))
    free = {*config.resume.allow, *(["train.steps"] if isinstance(before, int) else [])}
    others = {key: both for key, both in changed.items() if key not in free}
    if others:
        raise UserError(
            f"{run_dir} holds another finished run: {_shown(others)}; give another run.dir"
        )
    if now <= before:
        raise UserError(
            f"{run_dir} has finished with train.steps={before}, and {_shown(changed)} would change "
            f"nothing of it; give more train.steps, or another run.dir"
        )
    if newest is None:
        raise UserError(
            f"{run_dir} has finished with train.steps={before} and holds no checkpoint to go on "
            f"from to {now}; give another run.dir"
        )
    _check_longer(config, data, run_dir, newest, (before, now))
    for name in (SUMMARY_FILE, LOSS_FIGURE):
        found.kept[name] = _renamed(name, f"step-{before}")
    found.notes.append(f"{run_dir} had finished with train.steps={before}; it goes on to {now}")


def _check_longer(
    config: Config,
    data: dict[str, Any],
    run_dir: Path,
    newest: tuple[Checkpoint, dict[str, Any]],
    lengths: tuple[int, int],
) -> None:
    """Refuse to make a finished run longer where its steps so far would have been others."""
    try:
        check_same_run(config, data, newest[1], str(newest[0].path))
    except OtherSettings:
        if "train.steps" in config.resume.allow:
            raise
        allow = ",".join([*config.resume.allow, "train.steps"])
        last = stable_end(config, lengths)
        early = [c for c in Store(newest[0].path.parent).checkpoints() if 0 < c.step <= last]
        start, besides = (early[-1], "") if early else (newest[0], f" 'resume.allow=[{allow}]'")
        at = "before its learning rate fell" if early else "from its end"
        raise UserError(
            f"{run_dir} has finished with train.steps={lengths[0]}, and its learning rate was that "
            f"of a run of that length. To go on to {lengths[1]} all the same: "
            f"'resume.allow=[{allow}]'. To leave it as it is and branch off {at}: run.dir=NEW "
            f"resume.start={start.path}{besides}"
        ) from None


def _shown(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())


def _renamed(name: str, tag: str) -> str:
    """`summary-TAG.json` of `summary.json`."""
    path = Path(name)
    return f"{path.stem}-{tag}{path.suffix}"


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
