"""What `nlscale eval guesses` takes, and its table. No torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from nlscale.config.arguments import whole
from nlscale.evaluate.trained import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--contexts",
        type=whole(least=1),
        default=8,
        metavar="N",
        help="of held-out text, as long as in training (default: %(default)s)",
    )


def show(console: Console, answers: Sequence[Answer]) -> None:
    """Print them: a row a model."""
    table = Table()
    table.add_column("model")
    table.add_column("guessed", justify="right")
    for answer in answers:
        share = answer.result["guessed"]
        low, high = (100 * end for end in share["interval"])
        table.add_row(answer.label, f"{100 * share['share']:.1f}% ({low:.1f}-{high:.1f})")
    console.print(table)
