"""The quickstart with kernels and without: whether whole runs learn the same, and how fast."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlscale.cluster.life.last_words import last_words
from nlscale.cluster.life.place import without_place
from nlscale.config import shipped
from nlscale.data.index import INDEX_NAME
from nlscale.errors import TrainingFailed
from nlscale.telemetry.figures import read_records, save_figure

FIGURE = "curves.png"
_FINAL_SHARE = 20
"""Of the steps one in so many, at the end, are averaged as the final loss."""
_BOUND = 0.03
"""Relative difference of the final losses: about three times the most that rounding alone made.
Training amplifies rounding. Over 300 steps of the quickstart on a CPU, bf16 runs that differ in
`train.micro_batch` alone (2, 4 and 8; of another seed 2 and 4) ended 0.05 % to 1.1 % apart, and
0.04 % to 0.9 % from one in fp32. So this finds what harms learning; what is wrong in a rare case is
found by the comparison with float64 alone (nlscale.ops.check)."""
_WAYS = {"kernels": ("with kernels", "true"), "torch": ("in torch alone", "false")}
"""By name: what the figure calls it, and `train.kernels`."""


def train_with_and_without_kernels(
    folder: Path, steps: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Train the quickstart in bf16 twice, one process each, and compare the losses of all steps.

    What is there of an earlier call is gone on with: data that are built, runs or the part of them
    that their checkpoints hold. On a CPU derivatives by hand take the place of kernels.

    Args:
        folder: takes `data`, the runs `kernels` and `torch`, what they print as `*.log`, and the
            figure `curves.png` of both losses.
        steps: of each run.
        overrides: of the recipe's keys, for both.

    Returns:
        - `steps`, `seconds` (that this call took), `figure` (its path)
        - `kernels` and `torch`, of each run: `final_loss` (mean of the last 5 % of the steps),
          `step_seconds` and `tokens_per_second`, medians
        - `final_difference`: of the final losses; `bound`, and whether it is `ok`, within that
        - `largest_difference` and `mean_difference`: of the losses of a step

        Differences are absolute ones over the loss in torch alone.

    Raises:
        TrainingFailed: the data were not built or a run failed, with what it said last; or a run
            has not recorded every step.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    if not (data / INDEX_NAME).exists():  # written last
        source = ["--source", "stdlib", "--tokenizer", "bytes", "--held-out", "0.03"]
        _nlscale(folder / "data.log", ["data", "build", *source, "--out", str(data)])
    runs = {}
    for name, (_, kernels) in _WAYS.items():
        recipe = str(shipped.find("quickstart"))
        own = [f"train.kernels={kernels}", "train.dtype=bf16", f"train.steps={steps}"]
        own += [f"data.dir={data}", f"run.dir={folder / name}", "wandb.enabled=false"]
        _nlscale(folder / f"{name}.log", ["train", recipe, *overrides, *own])
        runs[name] = _read(folder / name, steps)
    compared = compare(runs["kernels"].losses, runs["torch"].losses)
    return {
        "steps": steps,
        **{name: run.figures() for name, run in runs.items()},
        **compared,
        "figure": str(_draw({name: run.losses for name, run in runs.items()}, folder / FIGURE)),
        "seconds": time.monotonic() - began,
    }


def _nlscale(log: Path, arguments: list[str]) -> None:
    """Run a verb in a process of its own, which is in no world of ranks."""
    command = [sys.executable, "-m", "nlscale", *arguments]
    with open(log, "ab") as output:
        start = output.tell()
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=without_place(os.environ),
        ).returncode
    if code:
        raise TrainingFailed(
            f"nlscale {' '.join(arguments[:2])}: {last_words(log, code, start)} (see {log})"
        )


@dataclass(frozen=True)
class _Run:
    """What a run has recorded, one number a step."""

    losses: NDArray[np.float64]
    step_seconds: NDArray[np.float64]
    tokens_per_second: NDArray[np.float64]

    def figures(self) -> dict[str, float]:
        return {
            "final_loss": _final(self.losses),
            "step_seconds": float(np.median(self.step_seconds)),
            "tokens_per_second": float(np.median(self.tokens_per_second)),
        }


def _read(run: Path, steps: int) -> _Run:
    by_step = {r["step"]: r for r in read_records(run) if r["kind"] == "train"}
    if sorted(by_step) != list(range(1, steps + 1)):
        raise TrainingFailed(f"{run} has not recorded every step up to {steps}; remove it")

    def series(key: str) -> NDArray[np.float64]:
        return np.array([by_step[step][key] for step in sorted(by_step)], dtype=np.float64)

    return _Run(series("loss"), series("step_seconds"), series("tokens_per_second"))


def _final(losses: NDArray[np.float64]) -> float:
    return float(losses[-max(1, len(losses) // _FINAL_SHARE) :].mean())


def compare(kernels: NDArray[np.float64], torch: NDArray[np.float64]) -> dict[str, Any]:
    """The differences of two runs' losses; see `train_with_and_without_kernels`."""
    final = abs(_final(kernels) - _final(torch)) / _final(torch)
    relative = np.abs(kernels - torch) / torch
    return {
        "final_difference": final,
        "bound": _BOUND,
        "ok": final <= _BOUND,
        "largest_difference": float(relative.max()),
        "mean_difference": float(relative.mean()),
    }


def _draw(losses: dict[str, NDArray[np.float64]], out: Path) -> Path:
    """Both losses over the steps, and below them how far they are apart."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    # Okabe-Ito: told apart with every common form of colour blindness.
    colours = {"kernels": "#0072B2", "torch": "#D55E00"}
    style = {"font.size": 10, "axes.spines.right": False, "axes.spines.top": False}
    with rc_context(style):
        figure = Figure(figsize=(8.0, 5.6), dpi=160, layout="constrained")
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
        for name, of_run in losses.items():
            steps, smooth = _smoothed(of_run)
            axes.plot(
                np.arange(1, len(of_run) + 1), of_run,
                color=colours[name], alpha=0.3, linewidth=0.7,
            )  # fmt: skip
            axes.plot(
                steps, smooth,
                color=colours[name],
                linewidth=1.8,
                # one lies on the other
                linestyle="-" if name == "kernels" else (0, (4, 2)),
                label=f"{_WAYS[name][0]}: {_final(of_run):.3f} at the end",
            )  # fmt: skip
        axes.set_ylabel("training loss (nats per token)")
        axes.legend(loc="upper right", frameon=False)
        kernels, torch = losses["kernels"], losses["torch"]
        apart = np.abs(kernels - torch) / torch
        below.plot(np.arange(1, len(apart) + 1), apart, color="#444444", linewidth=0.8)
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
        below.set_ylim(bottom=0)
        below.set_ylabel("difference\nof a step")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in (axes, below):
            panel.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        figure.suptitle(
            f"the quickstart in bf16, {len(apart)} steps with kernels and without",
            x=0.02, ha="left", fontsize=12, fontweight="bold",
        )  # fmt: skip
        return save_figure(figure, out)


def _smoothed(losses: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps, and the mean loss of one in twenty of all around each."""
    width = max(1, len(losses) // _FINAL_SHARE)
    smooth: NDArray[np.float64] = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    return np.arange(len(smooth), dtype=np.float64) + (width + 1) / 2, smooth
