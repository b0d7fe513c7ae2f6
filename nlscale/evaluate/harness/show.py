"""The figures of tasks of lm-evaluation-harness, of models beside each other. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nlscale.evaluate.harness.figures import called, normal
from nlscale.evaluate.harness.suite import SUITES
from nlscale.evaluate.trained import Answer

_SHARES = ("acc", "acc_norm")
"""Metrics of which a suite has an average."""


def show(console: Console, answers: Sequence[Answer]) -> None:
    """Print a table: a row for each task, metric and model."""
    result, several = answers[0].result, len(answers) > 1
    whose = "" if several else f"{answers[0].label}, step {answers[0].step:,}: "
    limit = f", the first {result['limit']:,} documents alone" if result["limit"] else ""
    title = f"{whose}lm-evaluation-harness {result['harness']}{limit}"
    table = Table(title=title, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("shots", "documents"):
        table.add_column(name, justify="right", no_wrap=True)
    if several:
        table.add_column("model", no_wrap=True)
    for name in ("", "±", "95% interval"):
        table.add_column(name, justify="right", no_wrap=True)
    models = [(f"{one.label}, step {one.step:,}",) if several else () for one in answers]
    by_model = [_by_name(answer) for answer in answers]
    wanted = _wanted([task["task"] for task in result["tasks"]])
    for task in result["tasks"]:
        before = task["task"]
        for figure in task["figures"]:
            if wanted and figure["metric"] not in wanted[task["task"]]:
                continue
            key = (task["task"], figure["metric"], figure["filter"])
            shots = "" if task["fewshot"] is None else f"{task['fewshot']}"
            row = (before, called(figure), shots, f"{task['documents']:,}")
            for model, figures in zip(models, by_model, strict=True):
                table.add_row(*row, *model, *_shown(figures[key]))
                row = ("", "", "", "")
            before = ""
    if wanted:
        table.add_section()
        row = ("average", "of the accuracies", "", "")
        for model, figures in zip(models, by_model, strict=True):
            table.add_row(*row, *model, *_shown(_average(figures, wanted)))
            row = ("", "", "", "")
    console.print(table)
    console.print("±: standard error; as the interval, over the documents of a task")


def _wanted(tasks: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """The metrics of each task, where the tasks are those of a suite."""
    for suite in SUITES.values():
        if [listed.task for listed in suite] == list(tasks):
            return {listed.task: listed.metrics for listed in suite}
    return None


def _by_name(answer: Answer) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (task["task"], figure["metric"], figure["filter"]): figure
        for task in answer.result["tasks"]
        for figure in task["figures"]
    }


def _average(
    figures: dict[tuple[str, str, str], dict[str, Any]], wanted: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Of the accuracies that a suite shows, each task alike, whose errors are independent."""
    some = [
        figure
        for (task, metric, _), figure in figures.items()
        if metric in _SHARES and metric in wanted[task]
    ]
    value = sum(figure["value"] for figure in some) / len(some)
    if any(figure["stderr"] is None for figure in some):
        return {"value": value, "stderr": None, "interval": None}
    stderr = math.sqrt(sum(figure["stderr"] ** 2 for figure in some)) / len(some)
    return {"value": value, "stderr": stderr, "interval": normal(value, stderr)}


def _shown(figure: dict[str, Any]) -> tuple[str, str, str]:
    """Value, standard error, interval."""
    if figure["stderr"] is None:
        return _number(figure["value"]), "", ""
    low, high = map(_number, figure["interval"])
    return _number(figure["value"]), _number(figure["stderr"]), f"{low} - {high}"


def _number(value: float) -> str:
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"
