"""`nlscale config`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import yaml

from nlscale.cli.arguments import FILE_WIDTH, add_recipe
from nlscale.config import recipe
from nlscale.config.curriculum import curriculum
from nlscale.config.vocabulary import Config, ParallelConfig
from nlscale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `config` takes; sets `func(args) -> int`."""
    add_recipe(parser, optional=True)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--explain",
        metavar="KEY",
        help="print only this key: its value, where the value came from, and what it means",
    )
    asked.add_argument(
        "--keys", action="store_true", help="list every key with its default and meaning"
    )
    asked.add_argument(
        "--optimizer",
        action="store_true",
        help="print which parameters each optimizer rule updates, of which shapes, at which rate, "
        "decay and momentum, level by level",
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
    elif args.optimizer:
        _print_rules(loaded.config)
    else:
        print(yaml.safe_dump(recipe.to_plain(loaded.config), sort_keys=False), end="")
        stages = curriculum(loaded.config)
        for stage in stages if len(stages) > 1 else []:
            print(f"# {stage}")
    return 0


def _print_rules(config: Config) -> None:
    from rich.console import Console

    from nlscale.plan.checks import check_sizes
    from nlscale.plan.on_cluster import vocabulary_of

    check_sizes(replace(config, parallel=ParallelConfig()), ranks=1)
    vocabulary = vocabulary_of(config)

    from nlscale.parallel.cpu import import_megatron_core

    import_megatron_core()
    from nlscale.cli.optimizer_table import print_rules
    from nlscale.levels.assigned import assigned

    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    print_rules(config, assigned(config, vocabulary), console)
