"""`nlscale continual`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from nlscale.cli.arguments import whole
from nlscale.errors import TrainingFailed

if TYPE_CHECKING:
    from rich.console import Console

    from nlscale.continual.stream import Stream
    from nlscale.scaling.sweep.runs import Run
    from nlscale.scaling.sweep.status import Status

_FILE_WIDTH = 120  # columns, where there is no terminal to ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `continual` takes; sets `func(args) -> int`."""
    parser.add_argument(
        "stream",
        metavar="STREAM",
        help="a YAML file of tasks and methods, or the name of one that comes with nlscale, such "
        "as languages",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: list the runs, and what those that have finished have found",
    )
    parser.add_argument(
        "--workers",
        type=whole(least=1, most=4096),
        metavar="N",
        help="runs at a time on this machine (default: the stream's workers, or a GPU each, or a "
        "core each)",
    )
    parser.add_argument(
        "--build-data",
        action="store_true",
        help="first run the commands of the stream's build_data, which skip data that are there",
    )
    parser.add_argument(
        "--baseline",
        metavar="METHOD",
        help="what the others are compared with, seed by seed (default: the stream's first)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(func=_continual)


def _continual(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nlscale.continual.results import baseline_of, results
    from nlscale.continual.show import print_results, print_runs
    from nlscale.continual.stream import read_stream
    from nlscale.scaling.sweep.build_data import build_missing
    from nlscale.scaling.sweep.runs import check_data, expand
    from nlscale.scaling.sweep.status import status

    stream = read_stream(args.stream, args.imports)
    baseline = baseline_of(stream, args.baseline)
    width = None if sys.stdout.isatty() else _FILE_WIDTH
    console = Console(highlight=False, markup=False, stderr=args.json, width=width)
    if args.build_data and not args.dry_run:
        build_missing(stream.sweep, lambda line: console.print(line, soft_wrap=True))
    runs = expand(stream.sweep)
    states = {run.name: status(run) for run in runs}
    todo = not args.dry_run and not all(state.finished for state in states.values())
    if todo:
        for line in check_data(stream.sweep, runs):
            console.print(line, soft_wrap=True)
    if not args.json:
        print_runs(stream, runs, states, console)
    failed: dict[str, str] = {}
    if todo:
        failed = _run_here(stream, runs, states, args.workers, console)
        states = {run.name: status(run) for run in runs}
    plain, curves = results(stream, runs, states, baseline)
    plain["runs"] = [
        {"name": run.name, "dir": str(run.folder), "state": states[run.name].word} for run in runs
    ]
    plain["failed"] = failed
    if curves and not args.dry_run:
        _leave(stream, plain, curves, console)
    if args.json:
        print(json.dumps(plain, indent=1))
    elif curves:
        print_results(stream, plain, console)
    if failed:
        for name, reason in failed.items():
            console.print(f"failed: {name}: {reason}", style="bold red", soft_wrap=True)
        raise TrainingFailed(
            f"{len(failed)} of {len(runs)} runs failed; mend that, and the same command runs only "
            f"what is missing"
        )
    return 0


def _run_here(
    stream: Stream,
    runs: list[Run],
    states: dict[str, Status],
    workers: int | None,
    console: Console,
) -> dict[str, str]:
    """Why runs failed, by name."""
    from nlscale.scaling.sweep.board import Board
    from nlscale.scaling.sweep.local import only_sweep, run_local, worker_places

    sweep = stream.sweep
    with only_sweep(sweep.folder) as owned:
        places = worker_places(workers or sweep.workers, sweep.ranks)
        console.print()
        with Board(runs, states, len(places), console) as board:
            return run_local(runs, states, places, sweep.ranks, board, owned)


def _leave(stream: Stream, plain: dict[str, Any], curves: Any, console: Console) -> None:
    """Write results and figures into the folder of the stream."""
    from nlscale.continual.figure import CURVES_FIGURE, MATRIX_FIGURE, draw_curves, draw_matrices
    from nlscale.continual.results import write_results

    folder = stream.sweep.folder
    written = [
        write_results(stream, plain),
        draw_matrices(stream, plain, folder / MATRIX_FIGURE),
        draw_curves(stream, curves, folder / CURVES_FIGURE),
    ]
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True)
    console.print()
