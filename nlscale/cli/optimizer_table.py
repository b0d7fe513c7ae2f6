"""What `nlscale config --optimizer` prints."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.config.units import human_count
from nlscale.config.vocabulary import Config
from nlscale.levels.assigned import Kind, LevelRules, Shapes
from nlscale.optim.table import rule


def print_rules(config: Config, levels: list[LevelRules], console: Console) -> None:
    """A table of the parameters of each level, and what is under each rule in all.

    Args:
        config: the run.
        levels: of `nlscale.levels.assigned.assigned`.
        console: where to.
    """
    peak = config.optimizer.learning_rate
    for own in levels:
        period = f"{own.level.period} step{'s' * (own.level.period > 1)}"
        console.print(f"level {own.level.name}: period {period}")
        for name, numbers in own.numbers.items():
            values = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            console.print(f"  {name}: {values}")
        if own.level.copy is not None:
            rate = own.level.copy.rate
            console.print(f"  a copy of the next faster level's MLPs, moved to them by {rate:g}")
        else:
            console.print(_table(own))
        console.print()
    console.print(
        f"A * stands for each of {config.model.layers} blocks. rate: factor on "
        f"optimizer.learning_rate, {peak:g} at its peak. decay: of weights, per update, at that "
        f"rate."
    )
    for line in _totals([kind for own in levels for kind in own.kinds]):
        console.print(line)


def _table(own: LevelRules) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("parameters", no_wrap=True)
    table.add_column("number", justify="right", no_wrap=True)
    table.add_column("tensors, of one block")
    for name in ("rule", "rate", "decay"):
        table.add_column(name, no_wrap=True)
    for kind in own.kinds:
        table.add_row(
            kind.name,
            human_count(kind.parameters),
            _shapes(kind.shapes),
            kind.rule,
            f"{kind.rate:.4g}",
            f"{kind.decay:.4g}",
        )
    return table


def _shapes(shapes: Shapes) -> str:
    return ", ".join(
        f"{number} x {[*shape]}" if number > 1 else f"{[*shape]}"
        for shape, number in shapes.items()
    )


def _totals(kinds: list[Kind]) -> list[str]:
    everything = sum(kind.parameters for kind in kinds)
    lines = []
    for name in dict.fromkeys(kind.rule for kind in kinds):
        under = [kind for kind in kinds if kind.rule == name]
        count = sum(kind.parameters for kind in under)
        number = sum(kind.tensors * sum(kind.shapes.values()) for kind in under)
        lines.append(
            f"{name}: {human_count(count)} of {human_count(everything)} parameters, "
            f"{count / everything:.1%}, in {number:,} "
            f"{'matrices' if rule(name).whole_matrices else 'tensors'}"
        )
    return lines
