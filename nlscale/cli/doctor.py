"""`nlscale doctor`."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from nlscale.cli.arguments import add_cluster, number, path
from nlscale.cluster.life.place import place
from nlscale.cluster.machines import load_cluster
from nlscale.errors import UserError
from nlscale.ops.compiled import OPS, build

if TYPE_CHECKING:  # rich is slow to import, and --help needs none
    from nlscale.cluster.doctor.machine import Asked
    from nlscale.cluster.doctor.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `doctor` takes; sets `func`."""
    parser.add_argument(
        "--path",
        type=path,
        default=Path("runs"),
        metavar="DIR",
        help="where runs and their checkpoints will be written (default: %(default)s)",
    )
    parser.add_argument("--data", type=path, metavar="DIR", help="a data folder to look at as well")
    add_cluster(parser, "what the nodes should have")
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="check all nodes together: start the same command on every rank, by torchrun or srun",
    )
    parser.add_argument(
        "--timeout",
        type=number(above=0, most=86400),
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for a rank that does not come or answer (default: %(default)g)",
    )
    parser.add_argument(
        "--build",
        nargs="*",
        choices=[*OPS],
        metavar="OPERATION",
        help=f"compile operations of DeepSpeed for this machine, in minutes, and check nothing: "
        f"{', '.join(f'{name} ({op.serves})' for name, op in OPS.items())} (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    here = place()
    if args.build is not None:
        for name in args.build or OPS:
            build(name, print)
        return 0
    if not args.nodes and here.world > 1:
        raise UserError(f"this is one of {here.world} ranks; add --nodes to check them together")
    if args.path.exists() and not args.path.is_dir():
        raise UserError(f"--path {args.path} is a file; give the folder of the runs")
    cluster = load_cluster(args.cluster) if args.cluster is not None else None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # addresses without names are no news

    from nlscale.cluster.doctor.machine import Asked

    return _examine(Asked(args.path, args.data, cluster, args.timeout), args)


def _examine(asked: Asked, args: argparse.Namespace) -> int:
    from nlscale.cluster.doctor.machine import examine
    from nlscale.cluster.doctor.report import progress

    with progress(place().rank == 0) as say:
        if args.nodes:
            from nlscale.cluster.doctor.nodes import examine as examine_nodes  # imports torch

            return examine_nodes(asked, say, lambda report: _show(report, args.json))
        report = examine(asked, say)
    _show(report, args.json)
    return report.exit_code


def _show(report: Report, as_json: bool) -> None:
    from nlscale.cluster.doctor.report import print_report
    from nlscale.telemetry.files import to_json

    if as_json:
        print(to_json(report.plain(), indent=1), flush=True)
    else:
        print_report(report)
    # torchrun ends the ranks that are left when the first of them ends with an error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
