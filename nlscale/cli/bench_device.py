"""`nlscale bench device`: accept a GPU, or a cluster, in one command."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nlscale.cli.arguments import number, path


def add_arguments(verbs: Any) -> None:
    """Hang the sub-parser under `verbs`; it sets `func(args) -> int`."""
    device = verbs.add_parser(
        "device",
        help="accept a new kind of GPU, or a cluster: is it right, and how fast",
        description="Measure part after part, each in a process of its own, the cheapest and most "
        "decisive first: kernels against float64, the scan against its floors, whole training "
        "steps beside a Transformer and plain torch, memory against the plan, curves with kernels "
        "and without, decoding, and under torchrun or srun the links between ranks. Writes a page "
        "with figures and a verdict on every goal. The same command goes on where it was stopped. "
        "Exit code 2 if a part failed or a goal was missed, 75 if the minutes were over before.",
    )
    device.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="folder of this device"
    )
    device.add_argument(
        "--minutes",
        type=number(above=0),
        default=9.0,
        metavar="N",
        help="for this call (default: %(default)g)",
    )
    device.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="parts by name, or what their names begin with, such as kernels or step.4k",
    )
    device.add_argument(
        "--tiny",
        action="store_true",
        help="at sizes that any machine takes, to see that it runs; a CPU gets no others",
    )
    device.add_argument("--json", action="store_true", help="print JSON instead of a table")
    device.set_defaults(func=_device)


def _device(args: argparse.Namespace) -> int:
    import torch

    from nlscale.verify.device.page import DATA, print_report
    from nlscale.verify.device.run import accept

    tiny = args.tiny or not torch.cuda.is_available()
    report = accept(args.out, args.minutes, args.only, tiny, _say)
    if report is None:
        return 0
    page = report.folder.path / "page"
    if args.json:
        print((page / DATA).read_text(encoding="utf-8"), end="")
    else:
        print_report(report.records, report.verdicts, page / "index.md")
    report.check()
    return 0


def _say(line: str) -> None:
    print(f"nlscale bench device: {line}", file=sys.stderr, flush=True)
