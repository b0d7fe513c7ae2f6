"""`nlscale data`: its verbs are in `data_build`, `data_look` and `data_mix`."""

from __future__ import annotations

import argparse

from nlscale.cli import data_build, data_look
from nlscale.cli.data_mix import add_mix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang the verbs' sub-parsers under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    data_build.add_arguments(verbs)
    data_look.add_arguments(verbs)
    add_mix(verbs)
