"""`nlscale verify-resume`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nlscale.cli.arguments import add_recipe, config_of, number, path, whole
from nlscale.cluster.life.owner import hold, refuse_if_alive
from nlscale.errors import UserError

EXIT_DIFFERS = 3
_TENSORS = ("parameters", "optimizer", "windows", "losses")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `verify-resume` takes; sets `func`."""
    add_recipe(parser)
    parser.add_argument(
        "--at", type=whole(), required=True, metavar="STEP", help="the step of the checkpoint"
    )
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="ranks=N[,tensor=T,...]",
        help="another layout to resume on; may be given several times (default: two that the "
        "recipe allows)",
    )
    parser.add_argument(
        "--ranks",
        type=whole(),
        metavar="N",
        help="ranks of the run itself (default: 2 copies of its model)",
    )
    parser.add_argument(
        "--tolerance",
        type=number(least=0),
        default=1e-6,
        metavar="X",
        help="largest relative difference on another layout (default: %(default)g)",
    )
    parser.add_argument(
        "--out", type=path, metavar="FOLDER", help="keep the runs there (default: nowhere)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=_verify)


def _verify(args: argparse.Namespace) -> int:
    config = config_of(args)
    ranks = args.ranks or 2 * config.parallel.tensor * config.parallel.pipeline
    if args.out is not None:
        refuse_if_alive(args.out, "another --out")
        _refuse_if_used(args.out)
    from nlscale.telemetry.files import to_json
    from nlscale.verify.resume import Arrangement, verify_resume  # imports torch

    layouts = [Arrangement.parse(text) for text in args.layout]
    with _folder(args.out) as folder:
        result = verify_resume(Path(args.recipe), args.overrides, args.at, layouts, ranks, folder)
    result["tolerance"] = args.tolerance
    result["passed"] = result["bitwise"] and all(
        entry["max_relative_difference"] <= args.tolerance for entry in result["layouts"]
    )
    if args.json:
        print(to_json(result, indent=1))
    else:
        _print(result)
    return 0 if result["passed"] else EXIT_DIFFERS


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where the runs go: that folder, which is held meanwhile, or one that is removed again.

    Raises:
        UserError: another process holds it, or something lies there.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="nlscale-verify-") as scratch:
            yield Path(scratch)
        return
    with hold(out, "nlscale verify-resume", instead="another --out"):
        _refuse_if_used(out)
        yield out


def _refuse_if_used(out: Path) -> None:
    """One that was killed before its first run has left no more than who it was."""
    inside = out.iterdir() if out.is_dir() else [out] if out.exists() else []
    if not all(path.name.startswith(".owner-") for path in inside):
        raise UserError(f"--out {out} exists already; give another folder")


def _print(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(
        f"\nkilled after the checkpoint at step {result['at']} and resumed; relative difference "
        f"from the run that\nnever stopped, of all tensors of a class together:\n"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("layout", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    for kind in (*_TENSORS, "counters"):
        table.add_column(kind, justify="right", no_wrap=True)
    for entry in result["layouts"]:
        found = [entry]
        if entry["compared_at"] != result["steps"]:
            found.append({"layout": "", "compared_at": result["steps"], **entry["at_end"]})
        for e in found:
            cells = [_cell(e["classes"][kind]) for kind in _TENSORS]
            equal = all(e["classes"][kind]["bitwise"] for kind in ("progress", "samples"))
            cells.append("same" if equal else "differ")
            table.add_row(e["layout"], str(e["compared_at"]), *cells)
    Console(highlight=False, markup=False).print(table)
    print()
    same = "bitwise" if result["bitwise"] else "NOT bitwise"
    verdict = "as it should be" if result["passed"] else "more than the tolerance allows"
    print(
        f"same layout: {same}; all: {verdict} ({result['tolerance']:g} on another layout, one step "
        f"after the checkpoint)"
    )


def _cell(found: dict[str, Any]) -> str:
    return "bitwise" if found["bitwise"] else f"{found['relative_difference']:.1e}"
