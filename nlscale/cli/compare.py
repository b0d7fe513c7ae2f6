"""`nlscale compare`."""

from __future__ import annotations

import argparse
import json
import sys

from nlscale.cli.arguments import figure, number, path
from nlscale.errors import UserError

_FILE_WIDTH = 120  # columns, where there is no terminal to ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `compare` takes; sets `func(args) -> int`."""
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="folders of runs, or of folders of runs"
    )
    parser.add_argument(
        "--by",
        action="append",
        required=True,
        metavar="KEY",
        help="the key whose values are compared, such as model.mixer; may be repeated: each is "
        "compared over all values of the others",
    )
    parser.add_argument(
        "--paired-by",
        action="append",
        metavar="KEY",
        help="the key whose values make pairs (default: run.seed); may be repeated",
    )
    parser.add_argument(
        "--metric",
        default="val_loss",
        metavar="NAME",
        help="val_loss: the mean of the last three validations (default); or a number of "
        "summary.json, such as final_val_loss, evaluation.NAME.FIGURE of its validations, or "
        "eval.NAME.FIGURE of nlscale eval, such as eval.automata.2x/targets",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the others of a factor are compared with (default: its first value)",
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="compare only these runs, for example optimizer.learning_rate=0.001",
    )
    parser.add_argument(
        "--each",
        action="append",
        default=[],
        metavar="KEY",
        help="a table for each value of this key, such as data.dir for several tasks, or finalist "
        "for each place of a search that kept several; may be repeated",
    )
    parser.add_argument(
        "--effect",
        type=number(above=0),
        metavar="X",
        help="say how many more pairs would show a difference of X with a power of 80%%",
    )
    parser.add_argument(
        "--level",
        type=number(above=0, below=1),
        default=0.95,
        metavar="P",
        help="that all intervals of the table hold together with (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--figure", type=figure, metavar="FILE", help="draw it too: .png, .svg, .pdf"
    )
    parser.set_defaults(func=_compare)


def _compare(args: argparse.Namespace) -> int:
    from nlscale.scaling.compare.answer import answer
    from nlscale.scaling.compare.question import SEED, Question
    from nlscale.scaling.compare.show import draw_answer, print_answer, to_plain

    question = Question(
        by=args.by,
        paired_by=args.paired_by or [SEED],
        metric=args.metric,
        baselines=_pairs(args.baseline, "--baseline"),
        each=args.each,
        only=_pairs(args.where, "--where"),
        effect=args.effect,
        level=args.level,
    )
    found = answer(args.runs, question)
    for line in found.left_out:
        print(f"nlscale compare: {line}", file=sys.stderr)
    if args.json:
        print(json.dumps(to_plain(found), indent=1))
    else:
        from rich.console import Console

        width = None if sys.stdout.isatty() else _FILE_WIDTH
        print_answer(found, Console(highlight=False, markup=False, width=width))
    if args.figure is not None:
        print(draw_answer(found, args.figure), file=sys.stderr if args.json else sys.stdout)
    return 0


def _pairs(given: list[str], option: str) -> dict[str, str]:
    found = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UserError(f"{option} {text!r}: write KEY=VALUE, such as model.mixer=attention")
        found[key] = value
    return found
