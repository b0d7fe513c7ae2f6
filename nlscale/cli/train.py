"""`nlscale train`."""

from __future__ import annotations

import argparse

from nlscale.cli.arguments import add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `train` takes; sets `func(args) -> int`."""
    add_recipe(parser)
    parser.set_defaults(func=_train)


def _train(args: argparse.Namespace) -> int:
    from nlscale.train.start import start

    return start(args.recipe, args.overrides)
