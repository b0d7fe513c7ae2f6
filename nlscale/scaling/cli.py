"""`nlscale fit`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from nlscale.errors import UserError

_FILE_WIDTH = 120  # columns, where there is no terminal to ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `fit` takes; sets `func(args) -> int`."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="RUNS|CSV",
        help="run folders, folders of them, or one CSV file with columns N, D, loss (nats per "
        "token) and perhaps flops",
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
        "--budget",
        action="append",
        default=[],
        metavar="FLOPS",
        help="give the compute-optimal N and D for this compute, such as 1e21 (may be repeated)",
    )
    parser.add_argument(
        "--bootstraps", type=int, default=300, metavar="R", help="resamples (default: 300)"
    )
    parser.add_argument(
        "--level", type=float, default=0.9, help="share that an interval holds (default: 0.9)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of resamples and starts (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--figure", type=Path, metavar="PNG", help="draw the law, its residuals and its optima"
    )
    parser.set_defaults(func=_fit)


def _fit(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nlscale.scaling.analysis import analyse, multipliers
    from nlscale.scaling.points import read_points
    from nlscale.scaling.report import (
        families_to_plain,
        print_fit,
        print_multipliers,
        to_plain,
    )

    budgets = tuple(_flops(text) for text in args.budget)
    if args.bootstraps < 20:
        raise UserError(f"--bootstraps {args.bootstraps}: percentiles need at least 20 resamples")
    if not 0 < args.level < 1:
        raise UserError(f"--level {args.level:g}: give a share between 0 and 1, such as 0.9")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give 0 or more")
    points, skipped = read_points(args.sources)
    for line in skipped:
        print(line, file=sys.stderr)
    for text in args.where:
        column, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--where {text!r}: write COLUMN=VALUE, such as family=hope")
        points = points.where(column.strip(), value.strip())
    parts = {"": points}
    if args.by:
        parts = {value: points.where(args.by, value) for value in points.values(args.by)}
        if len(parts) < 2:
            raise UserError(f"--by {args.by}: {points.source} has one value, {next(iter(parts))}")
    options = (budgets, args.bootstraps, args.level, args.seed)
    fits = {name: analyse(part, *options) for name, part in parts.items()}
    ratios = multipliers(fits)

    console = Console(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    if args.json:
        one = fits.get("")
        plain = to_plain(one) if one and not args.by else families_to_plain(args.by, fits, ratios)
        print(json.dumps(plain, indent=1))
    else:
        for one in fits.values():
            print_fit(one, console)
            console.print()
        if ratios:
            print_multipliers(ratios, console)
        elif args.by:
            console.print(
                "no multiplier: no loss is within the data of both, and a fit is ill-conditioned"
            )
    if args.figure:
        from nlscale.scaling.figure import draw_families, draw_fit

        try:
            if args.by:
                written = draw_families(fits, ratios, args.figure)
            else:
                written = draw_fit(fits[""], args.figure)
        except (OSError, ValueError) as error:
            raise UserError(f"--figure {args.figure}: {error}") from None
        print(written, file=sys.stderr if args.json else sys.stdout)
    for one in fits.values():
        for optimum in one.optimal:
            if optimum.refused:
                raise UserError(
                    f"{one.points.source}: no optimum for {optimum.flops:g} FLOPs, which is "
                    f"outside the data, from an ill-conditioned fit: {optimum.refused}"
                )
    return 0


def _flops(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"--budget {text!r} is not a number of FLOPs, such as 1e21") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--budget {text}: it must be finite and above 0")
    return value
