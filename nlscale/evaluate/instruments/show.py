"""The scores of models on their tasks, as a table. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nlscale.evaluate.trained import Answer


def show(console: Console, answers: Sequence[Answer]) -> None:
    """Print them: a table for each task, a row for each model and length."""
    for task in dict.fromkeys(answer.result["task"] for answer in answers):
        _show([answer for answer in answers if answer.result["task"] == task], console)


def _show(answers: Sequence[Answer], console: Console) -> None:
    result, several = answers[0].result, len(answers) > 1
    whose = "" if several else f"{answers[0].label}, step {answers[0].step:,}: "
    table = Table(title=f"{whose}{result['task']}", title_justify="left")
    if several:
        for name in ("model", "mixer", "step"):
            table.add_column(name, no_wrap=True)
    for name in ("", "tokens", "targets right", "examples without a mistake"):
        table.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        for one in answer.result["lengths"]:
            model = (answer.label, answer.mixer, f"{answer.step:,}") if several else ()
            shares = map(_shown, (one["targets"], one["examples"]))
            table.add_row(*model, f"{one['factor']}x", f"{one['length']:,}", *shares)
    console.print(table)
    console.print(
        f"{result['about']}; by chance {result['chance']:.1%} of the targets are right; in "
        f"brackets 95% intervals"
    )
    longer = {one["factor"]: one["task"] for answer in answers for one in answer.result["lengths"]}
    console.print("\n".join(f"{n}x: {task}" for n, task in longer.items() if n > 1))


def _shown(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f"{share['share']:.1%} ({100 * low:.1f}-{100 * high:.1f}) of {share['of']:,}"
