"""`nlscale figure`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `figure` takes; sets `func(args) -> int`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        metavar="PNG",
        help="the file to write (default: RUN/loss.png, or comparison.png for several runs)",
    )
    parser.set_defaults(func=_figure)


def _figure(args: argparse.Namespace) -> int:
    from nlscale.telemetry.figures import draw_comparison, draw_loss

    runs = [Path(run) for run in args.runs]
    if len(runs) == 1:
        print(draw_loss(runs[0], Path(args.out) if args.out else None))
    else:
        out = Path(args.out or "comparison.png")
        print(draw_comparison({run.name: run for run in runs}, out))
    return 0
