"""`nlscale plan`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from nlscale.cli.arguments import FILE_WIDTH, add_cluster, add_recipe, config_of, figure, number
from nlscale.cluster.machines import UTILISATION, Cluster
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `plan` takes; sets `func(args) -> int`."""
    add_recipe(parser)
    add_cluster(parser, "the machines", required=True)
    parser.add_argument(
        "--utilisation",
        type=number(above=0, most=1),
        default=UTILISATION,
        metavar="SHARE",
        help="of the GPUs' peak at which a step computes (MFU), from which follows what of the "
        "link's time it hides (default: %(default)s)",
    )
    parser.add_argument(
        "--step-seconds",
        type=number(above=0),
        metavar="S",
        help="what a step computes for, where it was measured, instead",
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="say instead the largest model of the recipe's shape that fits, with the state of all "
        "levels on the GPUs and with that of slow ones in host memory",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--figure", type=figure, metavar="PNG", help="draw the bytes of each step of a cycle"
    )
    parser.set_defaults(func=_plan)


def _plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nlscale.plan import load_cluster, make_plan
    from nlscale.plan.advice import does_not_fit
    from nlscale.plan.figure import draw_plan
    from nlscale.plan.tables import print_plan

    config, cluster = config_of(args), load_cluster(args.cluster)
    if args.largest:
        if args.figure:
            raise UserError("--largest makes no plan to draw; leave --figure out")
        return _largest(config, cluster, args.json)
    plan = make_plan(config, cluster, args.utilisation, args.step_seconds)
    if args.figure and not plan.plain:
        where = "is one node" if cluster.nodes == 1 else "holds each data-parallel group in a node"
        raise UserError(f"--figure: {cluster.name} {where}, no gradient crosses the network")
    if args.json:
        print(json.dumps(plan.to_plain(), indent=1))
    else:
        width = None if sys.stdout.isatty() else FILE_WIDTH
        print_plan(plan, Console(highlight=False, markup=False, width=width))
    if args.figure:
        try:
            written = draw_plan(plan, args.figure)
        except (OSError, ValueError) as error:
            raise UserError(f"--figure {args.figure}: {error}") from None
        print(written, file=sys.stderr if args.json else sys.stdout)
    if not plan.fits:
        raise UserError(does_not_fit(plan, config))
    return 0


def _largest(config: Config, cluster: Cluster, as_json: bool) -> int:
    from nlscale.plan.largest import largest, say_largest

    found = dict(zip(("hbm", "host"), largest(config, cluster), strict=True))
    if as_json:
        plain = {memory: None if own is None else asdict(own) for memory, own in found.items()}
        print(json.dumps(plain, indent=1))
    else:
        for memory, own in found.items():
            print(say_largest(memory, own))
    return 0
