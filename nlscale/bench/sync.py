"""Bytes that really leave a node, against the plan, with and without deferral and staggering.

Each mode trains the project's own model by the project's own windows and optimizers on emulated
nodes, on the same random tokens. A rank of each node reads the counter of its link right after
the ranks have agreed on a step: by then all that the step before sent has arrived. The first step
is left out, and so is the last, which applies unfinished windows; between them lie whole cycles of
the periods, so that the mean is exact.

Every mode is run once more with links that nothing limits: what the limit adds to a step is the
time that the step spends on the link, and only that can shrink with the bytes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.bench.modes import WARMUP, Bench, Mode
from nlscale.bench.netns import EmulatedNodes, sent_bytes
from nlscale.bench.ranks import run_ranks, scratch
from nlscale.bench.tokens import random_tokens
from nlscale.config.vocabulary import Config
from nlscale.errors import TrainingFailed
from nlscale.parallel.layout import process_groups
from nlscale.plan import traffic
from nlscale.step.trainer import Trainer


@dataclass(frozen=True)
class Measured:
    """What one rank saw."""

    node: int
    sent: list[int]
    """The link's counter after the warm-up and after each measured step, bytes."""
    seconds: float
    """A measured step, mean."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure every mode; progress goes to standard error.

    Returns:
        `nodes`, `ranks_per_node`, `rate`, `steps`, and `modes`, a list of
        - `mode`: every-step, deferred, every-step-staggered or deferred-staggered
        - `measured_bytes_per_step`: leaving a node, mean over steps and nodes
        - `planned_bytes_per_step`: the same by the plan
        - `ratio`: measured to planned
        - `peak_bytes`: of the largest step of any node; `planned_peak_bytes`: by the plan
        - `bytes_per_step_by_node`: the mean of each node
        - `step_seconds`; `step_time_ratio`: to `every-step`
        - `link_seconds`: what the limited link adds to a step; `link_time_ratio`: to `every-step`
        - `max_relative_difference`: after the last step, max over parameters of |a - b| / |b|,
          where b are those of the every-step mode with the same phases

    Raises:
        UserError: nodes cannot be emulated here.
        TrainingFailed: a step was not finite.
    """
    results: list[dict[str, Any]] = []
    with scratch() as folder:
        unlimited = _run_modes(bench, EmulatedNodes(bench.nodes.count, rate=None), folder)
        limited = _run_modes(bench, bench.nodes, folder)
        for (mode, config), measured, free in zip(
            bench.configurations(), limited, unlimited, strict=True
        ):
            planned = traffic(config, bench.levels, bench.vocabulary, bench.nodes.count)
            result = _result(mode, measured, planned.mean, planned.peak)
            result["link_seconds"] = result["step_seconds"] - free[0].seconds
            results.append(result)
            for key in ("step", "link"):
                to = results[0][f"{key}_seconds"]
                result[f"{key}_time_ratio"] = result[f"{key}_seconds"] / to
            result["max_relative_difference"] = _difference(folder, mode, bench.ranks)
    return {
        "nodes": bench.nodes.count,
        "ranks_per_node": bench.ranks_per_node,
        "rate": bench.nodes.rate,
        "steps": bench.steps,
        "modes": results,
    }


def _run_modes(bench: Bench, nodes: EmulatedNodes, folder: Path) -> list[list[Measured]]:
    """What every rank saw, mode by mode; the parameters are left in `folder`."""
    measured = []
    with nodes:
        for mode, config in bench.configurations():
            started = time.monotonic()
            name = f"{mode.name}, {nodes.rate or 'no limit'}"
            work = partial(_train_and_measure, config, bench, mode.name, name, folder)
            measured.append(run_ranks(nodes, bench.ranks_per_node, work))
            _note(f"{name}: done in {time.monotonic() - started:.0f} s")
    return measured


def _train_and_measure(
    config: Config, bench: Bench, mode: str, name: str, folder: Path
) -> Measured:
    """On every rank: train, read the counter, leave the parameters in `folder`."""
    torch.set_num_threads(1)
    sent: list[int] = []
    times: list[float] = []
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, bench.levels, bench.vocabulary)

        def read_counter() -> None:
            if trainer.counters.step > WARMUP:
                sent.append(sent_bytes())
                times.append(time.monotonic())
                # The ranks of a node wait for the reading, so that nothing of this step is in it;
                # they do so on `lo`, which no link counts.
                dist.barrier(group=layout.replica)

        for step in range(1, config.train.steps + 1):
            batches = random_tokens(config, step, layout.data_rank, layout.data_size)
            verdict, _ = trainer.take_step(batches, before_update=read_counter)
            if not verdict.admitted:
                raise TrainingFailed(f"{name}: step {step} was not finite; nothing was measured")
            if layout.is_writer and step % max(1, config.train.steps // 4) == 0:
                _note(f"{name}: step {step}/{config.train.steps}")
        parameters = {n: p.detach().clone() for n, p in trainer.named_parameters().items()}
        torch.save(parameters, folder / f"{mode}-{layout.rank}.pt")
        node = layout.rank // bench.ranks_per_node
    return Measured(node, sent, (times[-1] - times[0]) / (len(times) - 1))


def _result(
    mode: Mode, measured: list[Measured], planned_mean: float, planned_peak: float
) -> dict[str, Any]:
    # the first rank of each node speaks for its link
    by_node = {m.node: np.diff(m.sent) for m in reversed(measured)}
    means = [float(by_node[node].mean()) for node in sorted(by_node)]
    mean = sum(means) / len(means)
    return {
        "mode": mode.name,
        "measured_bytes_per_step": mean,
        "planned_bytes_per_step": planned_mean,
        "ratio": mean / planned_mean,
        "peak_bytes": max(int(sent.max()) for sent in by_node.values()),
        "planned_peak_bytes": planned_peak,
        "bytes_per_step_by_node": means,
        "step_seconds": measured[0].seconds,
    }


def _difference(folder: Path, mode: Mode, ranks: int) -> float:
    """Max over ranks and parameters of |a - b| / |b|, 0 for a mode that is its own reference."""
    worst = 0.0
    for rank in range(ranks):
        mine = torch.load(folder / f"{mode.name}-{rank}.pt")
        reference = torch.load(folder / f"{mode.reference}-{rank}.pt")
        for name, b in reference.items():
            gap = (mine[name].double() - b.double()).norm().item()
            worst = max(worst, gap / max(b.double().norm().item(), 1e-30))
    return worst


def print_result(result: dict[str, Any]) -> None:
    """Print the table of a finished bench."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    console.print(
        f"{result['nodes']} emulated nodes, ranks on each: {result['ranks_per_node']}, "
        f"{result['rate']} a node, {result['steps']} steps\n"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("\nmode", no_wrap=True)
    for column in (
        "MB a\nstep", "\nplan", "MB at\nmost", "\nplan", "step,\nms", "step,\nrel.",
        "link,\nrel.", "weights\ndiffer",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for mode in result["modes"]:
        own = mode["mode"].startswith("every-step")
        table.add_row(
            mode["mode"],
            *(
                f"{mode[key] / 1e6:#.3g}"
                for key in (
                    "measured_bytes_per_step",
                    "planned_bytes_per_step",
                    "peak_bytes",
                    "planned_peak_bytes",
                )
            ),
            f"{1e3 * mode['step_seconds']:.0f}",
            f"{mode['step_time_ratio']:.2f}",
            f"{mode['link_time_ratio']:.2f}",
            "reference" if own else f"{mode['max_relative_difference']:.1e}",
        )
    console.print(table)
    staggered = next(m for m in result["modes"] if m["mode"] == "deferred-staggered")
    console.print(
        "\nBytes are those leaving one node in a step, TCP/IP headers and acknowledgements "
        "included.\nLink: what its limit adds to a step of the same mode; rel.: relative to "
        "every-step.\n"
        "A deferred mode differs from the every-step mode of the same phases.\n"
        "The largest step of deferred-staggered sends "
        f"{staggered['peak_bytes'] / staggered['measured_bytes_per_step']:.2f} times its mean."
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
