"""Scores of needles, as a table. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nlscale.data.needles.kinds import KINDS
from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.instruments.show import show as show_tasks
from nlscale.evaluate.trained import Answer


def show(console: Console, answers: Sequence[Answer]) -> None:
    """Print them: a row a kind and model, a column a length. Tasks of symbols as tasks are."""
    symbols = [answer for answer in answers if answer.result["symbols"]]
    if symbols:
        show_tasks(console, symbols)
    texts = [answer for answer in answers if not answer.result["symbols"]]
    if texts:
        _show(console, texts)


def _show(console: Console, answers: Sequence[Answer]) -> None:
    first, several = answers[0], len(answers) > 1
    title = "references found, in percent"
    table = Table(
        title=title if several else f"{first.label}, step {first.step:,}: {title}",
        title_justify="left",
    )
    table.add_column("kind", no_wrap=True)
    if several:
        table.add_column("model", no_wrap=True)
    lengths = sorted({length for answer in answers for length in answer.result["lengths"]})
    for length in lengths:
        table.add_column(f"{shown(length)} tokens", justify="right", no_wrap=True)
    kinds = list(dict.fromkeys(kind for answer in answers for kind in answer.result["kinds"]))
    for kind in kinds:
        for number, answer in enumerate(answers):
            cells = {c["length"]: c for c in answer.result["cells"] if c["kind"] == kind}
            model = (f"{answer.label} ({answer.mixer})",) if several else ()
            scores = [_shown(cells[n]["score"]) if n in cells else "-" for n in lengths]
            table.add_row(kind if not number else "", *model, *scores)
        if several:
            table.add_section()
    console.print(table)
    for kind in kinds:
        console.print(f"{kind}: {KINDS[kind].about}")
    for text in dict.fromkeys(_about(answer, several) for answer in answers):
        console.print(text)
    console.print("in brackets 95% intervals (Wilson)")


def _about(answer: Answer, several: bool) -> str:
    result = answer.result
    whose = f"{answer.label}: " if several else ""
    trained = f", on {result['trained_on']}" if result["trained_on"] else ""
    return (
        f"{whose}{result['samples']} samples a kind and length, {result['form']} form, haystack "
        f"{result['haystack']}; trained at {shown(result['trained_length'])} tokens{trained}"
    )


def _shown(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f"{100 * share['share']:.0f} ({100 * low:.0f}-{100 * high:.0f})"
