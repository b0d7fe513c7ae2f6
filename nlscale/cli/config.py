"""`nlscale config`."""

from __future__ import annotations

import argparse

import yaml

from nlscale.cli.arguments import add_recipe
from nlscale.config import recipe
from nlscale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `config` takes; sets `func(args) -> int`."""
    add_recipe(parser, optional=True)
    parser.add_argument(
        "--explain",
        metavar="KEY",
        help="print only this key: its value, where the value came from, and what it means",
    )
    parser.add_argument(
        "--keys", action="store_true", help="list every key with its default and meaning"
    )
    parser.set_defaults(func=_config)


def _config(args: argparse.Namespace) -> int:
    if args.keys:
        print(recipe.describe_keys())
        return 0
    if args.recipe is None:
        raise UserError("give a recipe, for example: nlscale config quickstart")
    loaded = recipe.load(args.recipe, args.overrides, trusted=True)
    if args.explain:
        print(recipe.explain(loaded, args.explain))
    else:
        print(yaml.safe_dump(recipe.to_plain(loaded.config), sort_keys=False), end="")
    return 0
