"""What arguments of several verbs are: recipes, clusters, paths, and numbers of a range."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlscale.config import recipe, scalars
from nlscale.config.fields import Range, expanded
from nlscale.config.vocabulary import Config


def path(text: str) -> Path:
    """A `type` of argparse: a file or folder, as keys of recipes take one."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def whole(**ends: float) -> Callable[[str], int]:
    """A `type` of argparse: whole numbers of a `Range`, such as `whole(least=1)`."""
    return _of_range(int, "a whole number", Range(**ends))


def number(**ends: float) -> Callable[[str], float]:
    """A `type` of argparse: finite numbers of a `Range`, such as `number(above=0, below=1)`."""
    return _of_range(float, "a number", Range(**ends))


def _of_range(kind: type, what: str, wanted: Range) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = scalars.read(text, kind)
        except scalars.Unreadable as error:
            fix = f"; {error}" if str(error) else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}{fix}") from None
        if not wanted.holds(value):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted.without(value)}")
        return value

    return read


def add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """A recipe and overrides of its keys."""
    parser.add_argument(
        "recipe",
        nargs="?" if optional else None,
        metavar="RECIPE",
        help="a YAML file of keys, or the name of one that comes with nlscale, such as quickstart",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="a key to set otherwise than the recipe, such as train.steps=100",
    )


def config_of(args: argparse.Namespace, *overrides: str) -> Config:
    """The configuration that they give, with further overrides.

    Raises:
        UserError: see `nlscale.config.recipe.load`.
    """
    return recipe.load(args.recipe, [*args.overrides, *overrides], trusted=True).config


def add_cluster(parser: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """`--cluster`: a cluster file or the name of one; `what` says what it is for."""
    parser.add_argument(
        "--cluster",
        required=required,
        metavar="YAML",
        help=f"{what}: a cluster file, or the name of one that comes with nlscale, such as "
        "two-nodes-16-gpus",
    )
