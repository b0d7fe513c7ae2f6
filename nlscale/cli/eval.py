"""`nlscale eval`: ask one or several trained models a question of the table of evaluations."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nlscale.config.arguments import figure, path
from nlscale.errors import UserError
from nlscale.evaluate.trained import TRAINED, Answer, Failed, Trained, trained

_OURS = ("command", "imports", "func", "evaluation", "models", "json", "figure", "cache")
"""Arguments that are no options of an evaluation."""
_PRINTED = Path("-")
_WIDEST = 240
_SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang a sub-parser for each evaluation under `parser`; each sets `func(args) -> int`.

    Raises:
        UserError: the options of an evaluation that a package has added are not there, or are
            called as those that every evaluation has.
    """
    verbs = parser.add_subparsers(dest="evaluation", metavar="NAME", required=True)
    for name, one in TRAINED.items():
        sub = verbs.add_parser(name, help=one.help, description=one.description)
        _add_all(sub, name, one)
        sub.set_defaults(func=_eval)
    # By itself: argparse names all choices, and not the nearest.
    verbs.choices = _Names(verbs.choices)


def _add_all(parser: argparse.ArgumentParser, name: str, one: Trained) -> None:
    """What every evaluation takes, and what this one does."""
    parser.add_argument(
        "models",
        type=path,
        nargs="+",
        metavar="MODEL",
        help="the folder of a run, a checkpoint, or what `nlscale checkpoint export` wrote",
    )
    before = len(parser._actions)
    try:
        one.add_arguments(parser)
        theirs = {action.dest for action in parser._actions[before:]}
        _add_output(parser, one)
    except argparse.ArgumentError as error:
        raise UserError(f"evaluation {name!r}: {error}; call the option otherwise") from None
    if taken := theirs.intersection(_OURS):
        raise UserError(
            f"evaluation {name!r}: an option is called {min(taken)!r}, as one that every "
            f"evaluation has; call it otherwise"
        )


def _add_output(parser: argparse.ArgumentParser, one: Trained) -> None:
    """Where results go."""
    parser.add_argument(
        "--json",
        type=path,
        nargs="?",
        const=_PRINTED,
        metavar="FILE",
        help="write the results as JSON; without FILE they are printed instead of the table",
    )
    if one.drawn_by is not None:
        drawn = "draw them: .png, .svg, .pdf"
        parser.add_argument("--figure", type=figure, metavar="FILE", help=drawn)
    parser.add_argument(
        "--cache",
        type=path,
        metavar="DIR",
        help="where results are kept, so that nothing is asked twice (default: the folder "
        "evals of the run or export)",
    )


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
    from nlscale.evaluate.asking.ranks import together
    from nlscale.evaluate.asking.session import ask_all

    one, drawing = trained(args.evaluation), getattr(args, "figure", None)
    options = {key: value for key, value in vars(args).items() if key not in _OURS}
    told = {"evaluation": args.evaluation, "models": [*map(str, args.models)]}
    with together(
        {**told, "options": {key: str(value) for key, value in options.items()}}
    ) as ranks:
        if ranks.first:
            for out in (args.json, drawing):
                if out not in (None, _PRINTED):
                    _check_writable(out)
        found = ask_all(
            args.evaluation, args.models, argparse.Namespace(**options), ranks, args.cache
        )
        failed = [model for model in found if isinstance(model, Failed)]
        if not ranks.first:
            return _SOME_FAILED if failed else 0
        answers = [model for model in found if isinstance(model, Answer)]
        if args.json == _PRINTED:
            print(_json(found))
        elif answers:
            one.show(_console(), answers)
        if args.json not in (None, _PRINTED):
            _write(args.json, _json(found) + "\n")
            print(f"results: {args.json}")
        if drawing is not None and answers:
            one.draw(answers, drawing)
            print(f"figure: {drawing}")
        for model in failed:
            print(f"nlscale: {model.label}: {model.error}", file=sys.stderr, flush=True)
    return _SOME_FAILED if failed else 0


def _json(found: Sequence[Answer | Failed]) -> str:
    """An object for one model, a list of them for several."""
    import json

    described = [model.described() for model in found]
    return json.dumps(described if len(described) > 1 else described[0], indent=1)


def _check_writable(out: Path) -> None:
    """Refuse a file that could not be written when all has been asked; makes its folder.

    Raises:
        UserError: it is a folder, or its own cannot be made or written.
    """
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Not asked of the permissions, which say little of root, quotas and network disks.
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        lies_in_a_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{out.parent} is no folder" if lies_in_a_file else error.strerror
        raise UserError(
            f"cannot write {out}: {reason}; name a file in a folder that can be written"
        ) from None


def _write(out: Path, text: str) -> None:
    from nlscale.telemetry.files import replace

    replace(out, text.encode())


def _console() -> Console:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a file has no width that a table must keep to
        console.width = _WIDEST
    return console
