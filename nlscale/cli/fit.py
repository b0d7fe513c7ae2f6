"""`nlscale fit`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlscale.cli.arguments import add_cluster, figure, number, path, whole
from nlscale.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from nlscale.scaling.law.analysis import Analysis
    from nlscale.scaling.law.points import Points

_FILE_WIDTH = 120  # columns, where there is no terminal to ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `fit` takes; sets `func(args) -> int`."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=path,
        metavar="RUNS|CSV",
        help="run folders, folders of them, or one CSV file with columns N, D, loss (nats per "
        "token) and perhaps flops, N_non_embedding, C (mean period of the levels, steps)",
    )
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="fit only these runs, for example family=hope (may be repeated)",
    )
    parser.add_argument(
        "--by",
        metavar="COLUMN",
        help="fit each value of this column, and compare their compute at equal loss",
    )
    parser.add_argument(
        "--parameters",
        choices=("total", "non-embedding"),
        default="total",
        help="what N counts: total, as Hoffmann et al. do, or all but the embedding (default: "
        "total; in a CSV file column N or N_non_embedding)",
    )
    parser.add_argument(
        "--period",
        action="store_true",
        help="fit also G log2(period): what the periods of the levels cost, where runs differ in "
        "them",
    )
    parser.add_argument(
        "--budget",
        action="append",
        type=number(above=0),
        default=[],
        metavar="FLOPS",
        help="give the compute-optimal N and D for this compute, such as 1e21 (may be repeated)",
    )
    parser.add_argument(
        "--bootstraps",
        type=whole(least=20, most=10**6),
        default=300,
        metavar="R",
        help="resamples (default: 300)",
    )
    parser.add_argument(
        "--level",
        type=number(above=0, below=1),
        default=0.9,
        metavar="SHARE",
        help="share that an interval holds (default: 0.9)",
    )
    parser.add_argument(
        "--seed",
        type=whole(least=0),
        default=0,
        metavar="N",
        help="of resamples and starts (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--figure", type=figure, metavar="PNG", help="draw the law, its residuals and its optima"
    )
    parser.add_argument(
        "--frontier",
        type=path,
        metavar="PNG",
        help="draw loss against the bytes that each run would send between nodes of --cluster",
    )
    add_cluster(parser, "the machines of --frontier")
    parser.set_defaults(func=_fit)


def _fit(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nlscale.scaling.law.analysis import multipliers
    from nlscale.scaling.show.text import families_to_plain, print_fit, print_multipliers, to_plain

    _check(args)
    console = Console(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    points = _points(args)
    parts = {"": points}
    if args.by:
        parts = {value: points.where(args.by, value) for value in points.values(args.by)}
        if len(parts) < 2:
            raise UserError(f"--by {args.by}: {points.source} has one value, {next(iter(parts))}")
        parts = {name: part.without_idle_period() for name, part in parts.items()}
    # Before the fit, which needs more runs than this does.
    network = _network(args, points, console) if args.frontier else {}
    fits, without = _fits(args, parts)
    ratios = multipliers(fits) if fits else []

    if args.json:
        plain: dict[str, Any] = {"not_fitted": without} if without else {}
        if args.by:
            plain |= families_to_plain(args.by, fits, ratios)
        elif fits:
            plain |= to_plain(fits[""])
        print(json.dumps(plain | network, indent=1))
    else:
        for name, reason in without.items():
            console.print(f"No law {f'of {name} ' if name else ''}is fitted: {reason}")
        for one in fits.values():
            print_fit(one, console)
            console.print()
        if ratios:
            print_multipliers(ratios, console)
        elif args.by and not without:
            console.print(
                "no multiplier: no loss is within the data of both, and a fit is ill-conditioned"
            )
    if args.figure:
        from nlscale.scaling.show.families import draw_families
        from nlscale.scaling.show.figure import draw_fit

        _draw(
            args,
            "--figure",
            lambda: (
                draw_families(fits, ratios, args.figure)
                if args.by
                else draw_fit(fits[""], args.figure)
            ),
        )
    for one in fits.values():
        for optimum in one.optimal:
            if optimum.refused:
                raise UserError(
                    f"{one.points.source}: no optimum for {optimum.flops:g} FLOPs, which is "
                    f"outside the data, from an ill-conditioned fit: {optimum.refused}"
                )
    return 0


def _fits(
    args: argparse.Namespace, parts: Mapping[str, Points]
) -> tuple[dict[str, Analysis], dict[str, str]]:
    """The law of each family, and why others have none, where the frontier is all that needs them.

    Raises:
        UserError: too few points for a law that was asked for, by itself or for what it gives.
    """
    from nlscale.scaling.law.analysis import analyse
    from nlscale.scaling.law.points import TooFew

    fits, without = {}, {}
    for name, part in parts.items():
        try:
            fits[name] = analyse(part, tuple(args.budget), args.bootstraps, args.level, args.seed)
        except TooFew as error:
            if not args.frontier or args.figure or args.budget:
                raise
            without[name] = str(error)
    return fits, without


def _check(args: argparse.Namespace) -> None:
    if (args.frontier is None) != (args.cluster is None):
        raise UserError(
            "--frontier and --cluster go together, such as --frontier bytes.png --cluster "
            "two-nodes-16-gpus"
        )


def _points(args: argparse.Namespace) -> Points:
    """What was measured, as far as it was asked for."""
    from nlscale.scaling.law.points import read_points

    points, skipped = read_points(args.sources, args.parameters, args.period)
    for line in skipped:
        print(line, file=sys.stderr)
    for text in args.where:
        column, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--where {text!r}: write COLUMN=VALUE, such as family=hope")
        points = points.where(column.strip(), value.strip())
    return points


def _network(args: argparse.Namespace, points: Points, console: Console) -> dict[str, Any]:
    """Draw loss against inter-node bytes; returns what JSON says of it."""
    from nlscale.cluster.machines import load_cluster
    from nlscale.scaling.law.network import sent_on
    from nlscale.scaling.show.network import draw_network
    from nlscale.scaling.show.text_network import network_to_plain, print_network

    cluster = load_cluster(args.cluster)
    runs = sent_on(points, cluster, args.by)
    if not args.json:
        print_network(runs, cluster, console)
    _draw(args, "--frontier", lambda: draw_network(runs, cluster, args.frontier))
    return network_to_plain(runs, cluster)


def _draw(args: argparse.Namespace, option: str, draw: Callable[[], Path]) -> None:
    try:
        written = draw()
    except (OSError, ValueError) as error:
        path = getattr(args, option.removeprefix("--"))
        raise UserError(f"{option} {path}: {error}") from None
    print(written, file=sys.stderr if args.json else sys.stdout)
