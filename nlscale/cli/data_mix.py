"""`nlscale data mix`: what a run would read of each source of its mixture."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nlscale.cli.arguments import FILE_WIDTH, add_recipe, config_of
from nlscale.config.units import human_count
from nlscale.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from nlscale.train.mix_plan import MixPlan, MixtureStage, SourcePlan


def add_mix(verbs: Any) -> None:
    """Add `mix` to the verbs of `nlscale data`; it sets `func(args) -> int`."""
    parser = verbs.add_parser(
        "mix",
        help="show what a run would read of each source of its mixture",
        description="Show the tokens, samples and epochs that a run would read of each source of "
        "its data.mixture and those of its stages, and the step after which a source has been read "
        "as often as its epochs allow. Nothing is trained.",
    )
    add_recipe(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=_mix)


def _mix(args: argparse.Namespace) -> int:
    from nlscale.train.mix_plan import mix_plan

    config = config_of(args)
    plan = mix_plan(config)
    if args.json:
        print(json.dumps(asdict(plan), indent=1))
    else:
        _show(plan)
    if plan.ends_after_step is not None:
        raise UserError(
            f"the mixture ends after step {plan.ends_after_step:,} of {plan.steps:,}, as all its "
            f"sources have been read as often as their epochs allow; leave out epochs of one, or "
            f"take train.steps={plan.ends_after_step}"
        )
    return 0


def _show(plan: MixPlan) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    several = len(plan.stages) > 1
    for stage in plan.stages if several else []:
        last = stage.first_step + stage.steps
        title = f"steps {stage.first_step + 1:,} to {last:,}"
        console.print(_table(f"{title}: {_size(stage)}", stage.sources, f"step {last:,}"))
    size = f"{human_count(plan.tokens)} tokens in {plan.steps:,} steps, {plan.samples:,} samples"
    console.print(_table(size, plan.sources, None if several else "the end"))
    if plan.rounded:
        console.print("the weights are rounded: no period of 65,536 samples has just these shares")


def _size(stage: MixtureStage) -> str:
    return f"{human_count(stage.tokens)} tokens, {stage.samples:,} samples"


def _table(title: str, sources: list[SourcePlan], end: str | None) -> Table:
    """Of sources that are read until `end`, if not their epochs end before; None: of many ends."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("source")
    for name in ("share", "an epoch", "tokens", "samples", "epochs"):
        table.add_column(name, justify="right")
    if end is not None:
        table.add_column("read until", justify="right")
    for one in sources:
        until = end if one.ends_after_step is None else f"step {one.ends_after_step:,}"
        table.add_row(
            one.name, f"{one.share:.2%}", human_count(one.epoch_tokens), human_count(one.tokens),
            f"{one.samples:,}", f"{one.epochs:.3f}", *([until] if end is not None else []),
        )  # fmt: skip
    return table
