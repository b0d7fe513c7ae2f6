"""`nlscale eval`: what a trained model gets right of the task that it was trained on."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nlscale.cli.arguments import path, whole
from nlscale.data.index import read_index
from nlscale.data.tasks.table import FAMILIES, TASKS, task_of_index
from nlscale.errors import UserError

if TYPE_CHECKING:
    from nlscale.data.tasks.task import Task
    from nlscale.evaluate.tasks import Score, Share
    from nlscale.generate.model import Model

_LONGEST = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang a sub-parser for each family of tasks under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="verb", metavar="TASKS", required=True)
    for family, names in FAMILIES.items():
        one = verbs.add_parser(
            family,
            help=f"score a run that was trained on {' '.join(names)}",
            description="Score a run on fresh examples of its task, and on longer ones: how often "
            "the most likely token is the right one, over the targets that count, and how many "
            "examples have no mistake; with 95% intervals (Wilson).",
        )
        one.add_argument(
            "run",
            type=path,
            metavar="RUN",
            help="the folder of a run, a checkpoint, or what `nlscale checkpoint export` wrote",
        )
        one.add_argument(
            "--lengths",
            type=_lengths,
            default=[1, 2, 4],
            metavar="1x,2x,...",
            help="how many times longer than those of training the examples are (default: "
            "1x,2x,4x)",
        )
        one.add_argument(
            "--examples",
            type=whole(least=1),
            default=256,
            metavar="N",
            help="of each length (default: %(default)s)",
        )
        one.add_argument(
            "--data",
            type=path,
            metavar="DIR",
            help="the data folder of the task, where it is not where the run had it",
        )
        one.add_argument("--json", action="store_true", help="print JSON")
        one.set_defaults(func=_eval)


def _lengths(text: str) -> list[int]:
    """Such as 1x,2x,4x."""
    numbers = [part.strip().removesuffix("x") for part in text.split(",")]
    if not all(n.isascii() and n.isdecimal() and 1 <= int(n) <= _LONGEST for n in numbers):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of lengths; write such as 1x,2x,4x, each from 1x to {_LONGEST}x"
        )
    return [int(n) for n in numbers]


def _eval(args: argparse.Namespace) -> int:
    from nlscale.evaluate.tasks import score
    from nlscale.generate.load import load

    model = load(args.run)
    folder = args.data or model.config.data.dir
    try:
        task = task_of_index(read_index(folder), folder)
    except UserError as error:
        raise UserError(f"{error}; or name the data of the run with --data") from None
    if TASKS[task.name].family != args.verb:
        raise UserError(f"{folder} holds {task}; use nlscale eval {task.family}")
    if model.config.data.sequence_length != task.length:
        raise UserError(
            f"{folder} holds {task}, whose examples have {task.length} tokens, and {args.run} was "
            f"trained with {model.config.data.sequence_length}; name its own data with --data"
        )
    scores = [score(model, task, factor, args.examples) for factor in args.lengths]
    if args.json:
        print(json.dumps(_described(args, model, task, scores), indent=1))
    else:
        _show(args, model, task, scores)
    return 0


def _described(
    args: argparse.Namespace, model: Model, task: Task, scores: list[Score]
) -> dict[str, object]:
    return {
        "run": str(args.run),
        "step": model.step,
        "mixer": model.config.model.mixer,
        "task": str(task),
        "chance": task.chance,
        "lengths": [
            {
                "factor": one.factor,
                "task": str(one.task),
                "length": one.task.length,
                "targets": one.targets.described(),
                "examples": one.examples.described(),
            }
            for one in scores
        ],
    }


def _show(args: argparse.Namespace, model: Model, task: Task, scores: list[Score]) -> None:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    table = Table(title=f"{args.run}, step {model.step:,}: {task}", title_justify="left")
    for name in ("", "tokens", "targets right", "examples without a mistake"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in scores:
        shares = map(_shown, (one.targets, one.examples))
        table.add_row(f"{one.factor}x", f"{one.task.length:,}", *shares)
    console.print(table)
    console.print(
        f"{task.about}; by chance {task.chance:.1%} of the targets are right; in brackets 95% "
        f"intervals"
    )
    console.print("\n".join(f"{one.factor}x: {one.task}" for one in scores if one.factor > 1))


def _shown(share: Share) -> str:
    low, high = share.interval
    return f"{share.share:.1%} ({100 * low:.1f}-{100 * high:.1f}) of {share.of:,}"
