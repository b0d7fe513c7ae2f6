"""Loss by position, as a table. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nlscale.evaluate.asking.sizes import shown
from nlscale.evaluate.trained import Answer, Result


def show(console: Console, answers: Sequence[Answer]) -> None:
    """Print them: a row a range of positions; of several models, a column each."""
    several = len(answers) > 1
    first = answers[0]
    title = "bits a byte by position" if several else f"{first.label}, step {first.step:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("position", justify="right", no_wrap=True)
    if several:
        for answer in answers:
            table.add_column(f"{answer.label}\n{answer.mixer}", justify="right")
    else:
        for name in ("contexts", "targets", "bits a byte", "perplexity"):
            table.add_column(name, justify="right", no_wrap=True)
    for i in range(len(first.result["positions"])):
        _row(table, [answer.result["positions"][i] for answer in answers])
    table.add_section()
    _row(table, [answer.result["all"] for answer in answers], "all")
    console.print(table)
    for answer in answers if several else answers[:1]:
        console.print(_about(answer, several))
    for answer in answers:
        for level in answer.result.get("context", ()):
            keys = ", ".join(f"{key} {value}" for key, value in level.items() if key != "level")
            console.print(
                f"{answer.label}: level {level['level']} learns from what is read: {keys}"
            )
        if answer.result.get("document_mask"):  # results that were kept before do not say it
            console.print(_masked(answer))
    console.print(
        "position: tokens of the context that were read before; in brackets 95% intervals over the "
        "contexts (Student's), none where there is one context"
    )


def _row(table: Table, ranges: Sequence[Result], label: str = "") -> None:
    one = ranges[0]
    label = label or f"{shown(one['from']) if one['from'] else 0} - {shown(one['to'])}"
    if len(ranges) > 1:
        table.add_row(label, *(with_interval(r["bits_per_byte"] or r["loss"]) for r in ranges))
        return
    figures = (one["bits_per_byte"], one["perplexity"])
    table.add_row(label, f"{one['contexts']}", f"{one['targets']:,}", *map(with_interval, figures))


def _about(answer: Answer, several: bool) -> str:
    result = answer.result
    whose = f"{answer.label}, step {answer.step:,}: " if several else ""
    unit = "" if result["all"]["bits_per_byte"] else ", nats a token, as its ids are no bytes"
    return (
        f"{whose}{result['text']}, {result['tokens']:,} tokens; trained at "
        f"{shown(result['trained_length'])}{unit}"
    )


def _masked(answer: Answer) -> str:
    return (
        f"{answer.label} was trained with documents masked (data.document_mask), each as if it "
        f"stood alone; here it reads on over separators, as it was not trained to: what it loses "
        f"late in a context may be due to that"
    )


def with_interval(figure: dict[str, Any] | None) -> str:
    """A figure and the ends of its interval, where it has them."""
    if figure is None:
        return "-"
    if figure["interval"] is None:
        return f"{figure['value']:.3f}"
    low, high = figure["interval"]
    return f"{figure['value']:.3f} ({low:.3f}-{high:.3f})"
