"""The number by which a run is compared: of its losses, its summary, or what was asked of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nlscale.errors import UserError
from nlscale.evaluate.asking.kept import EVALS
from nlscale.scaling.compare.question import VAL_LOSS
from nlscale.telemetry.figures import read_records
from nlscale.telemetry.files import read_object

LAST = 3
"""Validations that `val_loss` averages; a run that validated less often has fewer."""
_WHILE_IT_TRAINED, _ASKED = "evaluation.", "eval."


def metric_of(folder: Path, summary: Mapping[str, Any], metric: str) -> float:
    """The number of a finished run that is compared.

    Raises:
        UserError: it has none, or has diverged.
    """
    if metric == VAL_LOSS:
        records = read_records(folder)
        losses = [r.get("loss") for r in records if r.get("kind") == "validation" and r.get("step")]
        if not losses:
            raise UserError(f"{folder} has no validation after its first step")
        last = [loss for loss in losses[-LAST:] if isinstance(loss, int | float)]
        if len(last) < len(losses[-LAST:]):
            raise UserError(f"{folder} has diverged: a loss of its last validations is none")
        value: Any = math.fsum(last) / len(last)
    elif metric.startswith(_WHILE_IT_TRAINED):
        value = _evaluated(folder, metric)
    elif metric.startswith(_ASKED):
        value = _asked(folder, metric)
    else:
        value = summary
        for name in metric.split("."):
            value = value.get(name, "") if isinstance(value, Mapping) else ""
        if value is None:
            raise UserError(f"{folder} has diverged, or did not measure it: {metric} is null")
    if isinstance(value, bool) or not isinstance(value, int | float):
        numbers = sorted(k for k, v in summary.items() if isinstance(v, int | float))
        raise UserError(
            f"{folder} has no number {metric}; there are {VAL_LOSS} (the mean of the last {LAST} "
            f"validations), {', '.join(numbers)}, evaluation.NAME.FIGURE and eval.NAME.FIGURE"
        )
    if not math.isfinite(value):
        raise UserError(f"{folder}: {metric} is {value}; a run that diverged has no place in it")
    return float(value)


def number(folder: Path, summary: Mapping[str, Any], name: str) -> float:
    """A number of its summary. Raises UserError: it is none."""
    value = summary.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{folder} has a damaged summary: {name} is {value}")
    return float(value)


def seconds_per_step(folder: Path, summary: Mapping[str, Any]) -> float | None:
    """That a step took, the median of the last start; None where it took no step."""
    if summary.get("tokens_per_second") is None or summary.get("steps") is None:
        return None
    speed, steps = (number(folder, summary, name) for name in ("tokens_per_second", "steps"))
    return number(folder, summary, "tokens") / (steps * speed) if steps * speed else None


def _evaluated(folder: Path, metric: str) -> Any:
    """Of the last record of an evaluation, `evaluation.NAME.FIGURE`."""
    name, _, figure = metric.removeprefix(_WHILE_IT_TRAINED).partition(".")
    records = [r for r in read_records(folder) if r.get("kind") == "evaluation"]
    of_it = [record for record in records if record.get("name") == name]
    return of_it[-1].get(figure) if of_it else None


def _asked(folder: Path, metric: str) -> Any:
    """Of what `nlscale eval NAME` keeps in the run, `eval.NAME.FIGURE`.

    Raises:
        UserError: nobody has asked, or several answers have that figure.
    """
    name, _, figure = metric.removeprefix(_ASKED).partition(".")
    found = {}
    for path in sorted((folder / EVALS).glob(f"{name}-*.json")):
        result = read_object(path).get("result")
        figures = result.get("figures") if isinstance(result, Mapping) else None
        if isinstance(figures, Mapping) and figure in figures:
            found[path] = figures[figure]
    if len(found) > 1:
        files = " and ".join(str(path) for path in found)
        raise UserError(f"{folder} has several {metric}, in {files}; keep the one that is meant")
    if not found:
        raise UserError(f"{folder} has no {metric}; ask with: nlscale eval {name} {folder}")
    return next(iter(found.values()))
