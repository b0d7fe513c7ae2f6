"""Bytes that really leave a node, and how long a step waits for them, with and without deferral.

Each mode trains the project's own model by the project's own windows and optimizers on emulated
nodes, on the same random tokens. The modes take turns, step by step, so that whatever else the
machine does meets all of them alike. A rank of each node reads the counter of its link right after
the ranks have agreed on a step: by then all that the step sent has arrived. The first step is left
out, and so is the last, which applies unfinished windows; between them lie whole cycles of the
periods, so that the mean is exact.

Exposed is the time that reductions across nodes go on when the last rank has ended its backward
pass and the reductions inside its node, so that what one rank computes longer than another is not
called the link's.
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
from nlscale.bench.netns import sent_bytes
from nlscale.bench.ranks import run_ranks, scratch
from nlscale.bench.tokens import random_tokens
from nlscale.errors import TrainingFailed
from nlscale.parallel.layout import Layout, process_groups
from nlscale.plan import traffic
from nlscale.step.trainer import Trainer
from nlscale.telemetry.terminal import duration


@dataclass(frozen=True)
class Measured:
    """What one rank saw of one mode."""

    node: int
    sent: list[int]
    """Bytes that its link sent in each measured step."""
    seconds: list[float]
    """That each took."""
    exposed: list[float]
    """Of them waiting for the link."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure every mode; progress goes to standard error.

    Returns:
        `nodes`, `ranks_per_node`, `rate`, `steps`, and `modes`, a list of
        - `mode`: every-step, deferred, each also -staggered and -overlapped
        - `measured_bytes_per_step`: leaving a node, mean over steps and nodes
        - `planned_bytes_per_step`: the same by the plan
        - `ratio`: measured to planned
        - `peak_bytes`: of the largest step of any node; `planned_peak_bytes`: by the plan
        - `bytes_per_step_by_node`: the mean of each node
        - `step_seconds`: mean; `step_time_ratio`: to `every-step`
        - `exposed_link_seconds`: that a step waits for the link, mean over steps and ranks;
          `exposed_to_every_step` and `exposed_to_twin`: over those of `every-step`, and of the mode
          that sends the same and overlaps nothing
        - `max_relative_difference`: after the last step, max over parameters of |a - b| / |b|,
          where b are those of the every-step mode with the same phases
        and `overlapped_step_time_ratio`: deferred-overlapped over every-step-overlapped.

    Raises:
        UserError: nodes cannot be emulated here.
        TrainingFailed: a step was not finite.
    """
    results: dict[str, dict[str, Any]] = {}
    with scratch() as folder:
        with bench.nodes:
            work = partial(_train_and_measure, bench, folder)
            by_rank = run_ranks(bench.nodes, bench.ranks_per_node, work)
        for mode, config in bench.configurations():
            planned = traffic(config, bench.levels, bench.vocabulary, bench.nodes.count)
            measured = [of_rank[mode.name] for of_rank in by_rank]
            result = _result(mode, measured, planned.mean, planned.peak)
            results[mode.name] = result
            first, twin = results["every-step"], results[mode.twin]
            result["step_time_ratio"] = result["step_seconds"] / first["step_seconds"]
            for name, other in (("every_step", first), ("twin", twin)):
                share = result["exposed_link_seconds"] / other["exposed_link_seconds"]
                result[f"exposed_to_{name}"] = share
            result["max_relative_difference"] = _difference(folder, mode, bench.ranks)
    deferred, every_step = results["deferred-overlapped"], results["every-step-overlapped"]
    return {
        "nodes": bench.nodes.count,
        "ranks_per_node": bench.ranks_per_node,
        "rate": bench.nodes.rate,
        "steps": bench.steps,
        "modes": list(results.values()),
        "overlapped_step_time_ratio": deferred["step_seconds"] / every_step["step_seconds"],
    }


def _train_and_measure(bench: Bench, folder: Path) -> dict[str, Measured]:
    """On every rank: train in every mode, read the counters, leave the parameters in `folder`."""
    torch.set_num_threads(1)
    modes = list(bench.configurations())
    steps = bench.config.train.steps
    progress = Steps(steps * len(modes))
    with process_groups(modes[0][1]) as layout:
        node = layout.rank // bench.ranks_per_node
        found = {mode.name: Measured(node, [], [], []) for mode, _ in modes}
        trainers = {
            mode.name: Trainer.build(config, layout, bench.levels, bench.vocabulary)
            for mode, config in modes
        }
        moments = {name: Moments(trainer) for name, trainer in trainers.items()}
        for step in range(1, steps + 1):
            for name, trainer in trainers.items():
                batches = random_tokens(bench.config, step, layout.data_rank, layout.data_size)
                dist.barrier(group=layout.host)
                began, before = time.monotonic(), sent_bytes()
                after: list[int] = []

                def read_counter(layout: Layout = layout, after: list[int] = after) -> None:
                    after.append(sent_bytes())
                    # The ranks of a node wait for the reading, so that nothing of what comes after
                    # is in it; they do so on `lo`, which no link counts.
                    dist.barrier(group=layout.replica)

                verdict, _ = trainer.take_step(batches, before_update=read_counter)
                if not verdict.admitted:
                    raise TrainingFailed(
                        f"{name}: step {step} was not finite; nothing was measured"
                    )
                seconds, exposed = time.monotonic() - began, moments[name].exposed(layout)
                if WARMUP < step < steps:
                    found[name].sent.append(after[0] - before)
                    found[name].seconds.append(seconds)
                    found[name].exposed.append(exposed)
                if layout.is_writer and (text := progress.done()):
                    _note(text)
        for name, trainer in trainers.items():
            parameters = {n: p.detach().clone() for n, p in trainer.named_parameters().items()}
            torch.save(parameters, folder / f"{name}-{layout.rank}.pt")
    return found


class Moments:
    """When this rank's reductions inside the node, and those across nodes, were over."""

    def __init__(self, trainer: Trainer) -> None:
        self.reduced = self.crossed = 0.0
        optimizer = trainer.optimizer
        finish = optimizer.finish_crossing

        def note() -> torch.Tensor:
            self.reduced = time.monotonic()
            finite = finish()
            self.crossed = time.monotonic()
            return finite

        optimizer.finish_crossing = note  # type: ignore[method-assign]

    def exposed(self, layout: Layout) -> float:
        """Seconds from when the last rank was there; all ranks of this machine have one clock."""
        last = torch.tensor(self.reduced, dtype=torch.float64)
        dist.all_reduce(last, op=dist.ReduceOp.MAX, group=layout.host)
        return max(0.0, self.crossed - last.item())


class Steps:
    """Says how far a bench is, ten times, and what is left."""

    def __init__(self, count: int) -> None:
        self._count, self._done, self._began = count, 0, time.monotonic()

    def done(self) -> str:
        """A step more; a line where it is time for one."""
        self._done += 1
        if self._done * 10 // self._count == (self._done - 1) * 10 // self._count:
            return ""
        left = (time.monotonic() - self._began) / self._done * (self._count - self._done)
        return f"step {self._done}/{self._count} of all modes, {duration(left)} left"


def _result(
    mode: Mode, measured: list[Measured], planned_mean: float, planned_peak: float
) -> dict[str, Any]:
    # the first rank of each node speaks for its link
    by_node = {m.node: np.array(m.sent) for m in reversed(measured)}
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
        "step_seconds": float(np.mean(measured[0].seconds)),
        "exposed_link_seconds": float(np.mean([m.exposed for m in measured])),
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
        "exposed,\nms", "of\ntwin", "weights\ndiffer",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for mode in result["modes"]:
        own = mode["mode"] in ("every-step", "every-step-staggered")
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
            f"{1e3 * mode['exposed_link_seconds']:.0f}",
            f"{mode['exposed_to_twin']:.2f}",
            "reference" if own else f"{mode['max_relative_difference']:.1e}",
        )
    console.print(table)
    staggered = next(m for m in result["modes"] if m["mode"] == "deferred-staggered")
    console.print(
        "\nBytes are those leaving one node in a step, TCP/IP headers and acknowledgements "
        "included.\nExposed: what a step waits for the link; of twin: over that of the same mode "
        "without overlap.\nStep, rel.: to every-step. Weights differ: from those of every-step "
        "with the same phases.\n"
        "The largest step of deferred-staggered sends "
        f"{staggered['peak_bytes'] / staggered['measured_bytes_per_step']:.2f} times its mean; "
        "a step of deferred-overlapped\ntakes "
        f"{result['overlapped_step_time_ratio']:.3f} times that of every-step-overlapped."
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
