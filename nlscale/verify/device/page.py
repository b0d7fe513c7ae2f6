"""The page of a device: what it is, verdicts, figures, and what every part has found."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.telemetry.files import replace, to_json
from nlscale.verify.device.figures import draw_scans, draw_steps
from nlscale.verify.device.goals import Judgement, Verdict
from nlscale.verify.device.parts import PARTS
from nlscale.verify.device.records import Folder, Record, State

PAGE, DATA = "index.md", "device.json"
_STYLES = {
    Judgement.met: "green",
    Judgement.missed: "bold red",
    Judgement.unknown: "yellow",
    Judgement.no_goal: "dim",
}


def write_page(folder: Folder, records: Mapping[str, Record], verdicts: list[Verdict]) -> Path:
    """Write `page/` of the folder: a page of Markdown, its figures, and all numbers as JSON.

    Returns:
        The page.
    """
    out = folder.path / "page"
    out.mkdir(exist_ok=True)
    found = {
        name: record.result
        for name, record in records.items()
        if record.state == State.done and record.result is not None
    }
    figures = _figures(folder, found, out)
    numbers = {
        "parts": {name: asdict(record) for name, record in records.items()},
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    replace(out / DATA, (to_json(numbers, indent=1) + "\n").encode())
    text = _markdown(records, found, verdicts, figures)
    replace(out / PAGE, text.encode())
    return out / PAGE


def _figures(folder: Folder, found: Mapping[str, Any], out: Path) -> dict[str, str]:
    """What each shows, by the name of its file."""
    drawn = {}
    if any(name.startswith("step.") for name in found):
        draw_steps(found, out / "steps.png")
        drawn["steps.png"] = "Tokens a second of whole training steps, by mixer and size"
    if any(name.startswith("scan.") for name in found):
        draw_scans(found, out / "scans.png")
        drawn["scans.png"] = "Time of the scan and of softmax attention, beside their floors"
    curves = folder.scratch("curves") / "curves.png"
    if "curves" in found and curves.is_file():
        shutil.copyfile(curves, out / "curves.png")
        drawn["curves.png"] = "Loss of the quickstart with kernels and without"
    return drawn


def _markdown(
    records: Mapping[str, Record],
    found: Mapping[str, Any],
    verdicts: list[Verdict],
    figures: Mapping[str, str],
) -> str:
    about = found.get("device")
    if about is None:
        return "# A device that could not be asked\n\n" + _parts(records)
    ranks = f", {about['ranks']} ranks" if about["ranks"] > 1 else ""
    head = [
        f"# {about['device']}{ranks}",
        f"Measured by `nlscale bench device` on {_days(records)} with nlscale "
        f"{', '.join(sorted({record.nlscale for record in records.values()}))}, torch "
        f"{about['torch']}, Triton {about['triton'] or 'missing'}, ptxas "
        f"{about['ptxas'] or 'missing'}, Python {about['python']}.",
    ]
    if about["sizes"] == "tiny" or about["gpu"] is None:
        head.append(
            "**A rehearsal**: sizes are tiny or this is no GPU. It shows that every part runs, and "
            "says nothing of speed."
        )
    if about["gpu"]:
        told = (f"{name} {value}" for name, value in about["gpu"].items())
        head.append("The device: " + ", ".join(told) + ".")
    sections = [*head, "## Goals", _goals(verdicts), "## Parts", _parts(records)]
    for file, what in figures.items():
        sections.append(f"![{what}]({file})")
    if records["device"].others:
        sections += ["## Ranks", _ranks(records)]
    if "costs" in found:
        sections += ["## What a step of hope costs", _costs(found["costs"])]
    return "\n\n".join(sections) + "\n"


def _days(records: Mapping[str, Record]) -> str:
    days = sorted({record.began[:10] for record in records.values()})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _goals(verdicts: list[Verdict]) -> str:
    rows = [_cells(verdict) for verdict in verdicts]
    return _table(("goal", "measured", "wanted", "verdict"), rows)


def _cells(verdict: Verdict) -> tuple[str, str, str, str]:
    value = "" if verdict.value is None else f"{verdict.value:.2f}"
    wanted = f"{'at least' if verdict.least else 'at most'} {verdict.bound:g}"
    why = f" ({verdict.why})" if verdict.why else ""
    return verdict.what, value, wanted, verdict.judgement.value + why


def _parts(records: Mapping[str, Record]) -> str:
    rows = [
        (f"`{one.part}`", one.what, one.state.value, f"{one.seconds:.0f} s", one.says)
        for one in _in_order(records)
    ]
    return _table(("part", "what", "", "took", "found"), rows)


def _in_order(records: Mapping[str, Record]) -> list[Record]:
    """That in which the parts are measured."""
    places = {part.name: place for place, part in enumerate(PARTS)}
    return sorted(records.values(), key=lambda record: places.get(record.part, len(places)))


def _ranks(records: Mapping[str, Record]) -> str:
    """What each is, and does at best: a slow one holds all others up."""
    abouts, bests = (_of_ranks(records.get(name)) for name in ("device", "ceilings"))
    rows = []
    for rank, about in enumerate(abouts):
        best = bests[rank] if bests else {}
        rates = [
            f"{best[key] / unit:.4g}" if key in best else ""
            for key, unit in (("bf16_flops_per_second", 1e12), ("copy_bytes_per_second", 1e9))
        ]
        rows.append((str(rank), about["host"], about["device"], *rates))
    return _table(("rank", "host", "device", "TFLOP/s in bf16", "GB/s of a copy"), rows)


def _of_ranks(record: Record | None) -> list[dict[str, Any]]:
    """What every rank has found; empty where the part is not done."""
    if record is None or record.result is None:
        return []
    return [record.result, *record.others]


def _costs(found: Mapping[str, Any]) -> str:
    rows = [
        (
            f"`{cost['name'][:60]}`",
            f"{cost['milliseconds']:.2f}",
            f"{cost['calls']:.0f}",
            f"{cost['share']:.1%}",
        )
        for cost in found["largest_costs"]
    ]
    table = _table(("kernel or operation", "ms a step", "calls", "of all"), rows)
    if found["host_waits"] is None:
        return table
    return table + (
        f"\n\nA step launches {found['launches']:.0f} kernels, which are busy for "
        f"{found['busy_ms']:.1f} ms of {1e3 * found['median_step_seconds']:.1f}; the host waits "
        f"{found['host_waits']:g} times, and {found['pageable_copies']:g} copies are of memory "
        f"that is not pinned."
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def print_report(records: Mapping[str, Record], verdicts: list[Verdict], page: Path) -> None:
    """The parts and the verdicts, for a person."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    about = records["device"].result if "device" in records else None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("part", "", "found"):
        table.add_column(name)
    table.add_column("took", justify="right")
    for one in _in_order(records):
        table.add_row(one.part, one.state.value, one.says, f"{one.seconds:.0f} s")
    console.print(table)
    goals = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("verdict", "measured", "wanted", "goal"):
        goals.add_column(name, justify="right" if name == "measured" else "left")
    known = [v for v in verdicts if v.judgement != Judgement.unknown or v.why]
    for verdict in known:
        what, value, wanted, judged = _cells(verdict)
        goals.add_row(judged, value, wanted, what, style=_STYLES[verdict.judgement])
    if known:
        console.print(goals)
    if len(known) < len(verdicts):
        console.print(f"{len(verdicts) - len(known)} goals are not measured yet")
    if about is not None and about["sizes"] == "tiny":
        console.print("a rehearsal at tiny sizes: no figure says anything of speed")
    console.print(f"page: {page}")
