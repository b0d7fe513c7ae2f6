"""What arguments of several verbs are: recipes, clusters, paths, and numbers of a range."""

from __future__ import annotations

import argparse

from nlscale.config import recipe
from nlscale.config.arguments import figure, number, path, size, whole
from nlscale.config.vocabulary import Config

__all__ = [
    "FILE_WIDTH",
    "add_cluster",
    "add_recipe",
    "config_of",
    "figure",
    "number",
    "path",
    "size",
    "whole",
]

FILE_WIDTH = 100
"""Columns of a table, where there is no terminal to ask."""


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
