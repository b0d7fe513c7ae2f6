"""`nlscale eval`: ask one or several trained models a question of the table of evaluations."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from nlscale.config.arguments import figure, path
from nlscale.errors import UserError
from nlscale.evaluate.trained import TRAINED, Answer, trained

_OURS = ("command", "imports", "func", "evaluation", "models", "json", "figure", "cache")
"""Arguments that are no options of an evaluation."""
_PRINTED = Path("-")
_WIDEST = 240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang a sub-parser for each evaluation under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="evaluation", metavar="NAME", required=True)
    for name, one in TRAINED.items():
        sub = verbs.add_parser(name, help=one.help, description=one.description)
        sub.add_argument(
            "models",
            type=path,
            nargs="+",
            metavar="MODEL",
            help="the folder of a run, a checkpoint, or what `nlscale checkpoint export` wrote",
        )
        one.add_arguments(sub)
        sub.add_argument(
            "--json",
            type=path,
            nargs="?",
            const=_PRINTED,
            metavar="FILE",
            help="write the results as JSON; without FILE they are printed instead of the table",
        )
        if one.drawn_by is not None:
            drawn = "draw them: .png, .svg, .pdf"
            sub.add_argument("--figure", type=figure, metavar="FILE", help=drawn)
        sub.add_argument(
            "--cache",
            type=path,
            metavar="DIR",
            help="where results are kept, so that nothing is asked twice (default: the folder "
            "evals of the run or export)",
        )
        sub.set_defaults(func=_eval)
    # By itself: argparse names all choices, and not the nearest.
    verbs.choices = _Names(verbs.choices)


class _Names(dict[str, Any]):
    """The names of evaluations; asking for another is an error that names the nearest."""

    def __contains__(self, name: object) -> bool:
        if name not in self.keys():
            try:
                trained(str(name))
            except UserError as error:
                raise argparse.ArgumentError(None, str(error)) from None
        return True

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def _eval(args: argparse.Namespace) -> int:
    from nlscale.evaluate.asking.ranks import begin
    from nlscale.evaluate.asking.session import ask_all

    one, drawing = trained(args.evaluation), getattr(args, "figure", None)
    options = {key: value for key, value in vars(args).items() if key not in _OURS}
    ranks = begin()
    with ranks.together():
        answers = ask_all(
            args.evaluation, args.models, argparse.Namespace(**options), ranks, args.cache
        )
        if not ranks.first:
            return 0
        if args.json == _PRINTED:
            print(_json(answers))
        else:
            one.show(_console(), answers)
        if args.json not in (None, _PRINTED):
            _write(args.json, _json(answers) + "\n")
            print(f"results: {args.json}")
        if drawing is not None:
            one.draw(answers, drawing)
            print(f"figure: {drawing}")
    return 0


def _json(answers: list[Answer]) -> str:
    """An object for one model, a list of them for several."""
    import json

    described = [answer.described() for answer in answers]
    return json.dumps(described if len(described) > 1 else described[0], indent=1)


def _write(out: Path, text: str) -> None:
    from nlscale.telemetry.files import replace

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    replace(out, text.encode())


def _console() -> Console:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file has no width that a table must keep to
        console.width = _WIDEST
    return console
