"""Draws what deferring slow levels buys: loss against inter-node bytes, from four real runs.

    python tools/levels_figure.py recipes/quickstart.yaml --out docs/levels.png [KEY=VALUE ...]

Trains the recipe on two ranks that count as two nodes: reduced at every step, deferred with
staggered phases, deferred with aligned phases, and with one period for all levels. Runs that have
finished are not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from nlscale.config.recipe import load
from nlscale.config.units import human_bytes
from nlscale.telemetry.figures import read_records

RUNS = {
    "every step": ["levels.reduction=every-step"],
    "deferred, staggered": [],
    "deferred, aligned": ["levels.stagger=false"],
    "one period (1 step)": [],  # its levels are set below
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--runs", type=Path, default=Path("runs/levels"), help="folder of the runs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    count = len(load(args.recipe, args.overrides).config.levels.spectrum)
    RUNS["one period (1 step)"] = [f"levels.spectrum.{i}.period=1 step" for i in range(count)]
    for name, overrides in RUNS.items():
        folder = args.runs / name.replace(" ", "-").replace(",", "")
        print(f"{name}: {folder}", flush=True)
        train(args.recipe, [*args.overrides, *overrides, f"run.dir={folder}"])
    draw({n: args.runs / n.replace(" ", "-").replace(",", "") for n in RUNS}, args.out)
    print(args.out)


def train(recipe: Path, overrides: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "nlscale", "train", str(recipe), "parallel.ranks_per_node=1", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def draw(runs: dict[str, Path], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    styles = [
        ("#8C8C8C", "-", 5.0),
        ("#0072B2", "-", 1.6),
        ("#D55E00", "-", 1.6),
        ("#009E73", "--", 1.6),
    ]
    for (name, folder), (color, line, width) in zip(runs.items(), styles, strict=True):
        records = list(read_records(folder))
        sent = {r["step"]: r["bytes_sent"] for r in records if r["kind"] == "train"}
        held_out = [r for r in records if r["kind"] == "validation" and r["step"] in sent]
        loss = [r["loss"] for r in held_out]
        total = sent[max(sent)]
        label = f"{name}: {loss[-1]:.3f} nats, {human_bytes(total)}"
        style = {"color": color, "linestyle": line, "linewidth": width}
        by_step.plot([r["step"] for r in held_out], loss, **style)
        by_bytes.plot([sent[r["step"]] / 1e6 for r in held_out], loss, label=label, **style)
    by_step.set_xlabel("step")
    by_step.set_ylabel("validation loss (nats per token)")
    by_step.set_title("by step: deferred lies on every step", fontsize=10, loc="left")
    by_bytes.set_xlabel("inter-node bytes sent by a node (MB)")
    by_bytes.set_title("by what crosses the network", fontsize=10, loc="left")
    by_bytes.legend(frameon=False, fontsize=9)
    for axes in (by_step, by_bytes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E0E0E0")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
