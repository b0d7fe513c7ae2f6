"""`nlscale figure`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nlscale.cli.arguments import figure, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `figure` takes; sets `func(args) -> int`."""
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        type=figure,
        metavar="PNG",
        help="the file to write (default: RUN/loss.png, or comparison.png for several runs)",
    )
    parser.set_defaults(func=_figure)


def _figure(args: argparse.Namespace) -> int:
    from nlscale.telemetry.figures import draw_comparison, draw_loss

    runs = list(dict.fromkeys(args.runs))
    if len(runs) == 1:
        print(draw_loss(runs[0], args.out))
    else:
        names = [run.name for run in runs]
        labels = [run.name if names.count(run.name) == 1 else str(run) for run in runs]
        by_label = dict(zip(labels, runs, strict=True))
        print(draw_comparison(by_label, args.out or Path("comparison.png")))
    return 0
