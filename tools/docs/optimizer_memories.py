"""How long an optimizer's memories of gradients last beside the periods of a model's levels.

python tools/docs/optimizer_memories.py                                     # the table
python tools/docs/optimizer_memories.py --out docs/optimizer-memories.png   # and the figure

Both are those of docs/concepts/optimizers.md. The weight of a gradient in a memory falls to half in
ln 2 / ln(1 / beta) updates; from one update of a level of period C to the next there are C steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nlscale.config.curriculum import tokens_per_step
from nlscale.config.recipe import load
from nlscale.config.vocabulary import OptimizerConfig
from nlscale.levels.spectrum import levels_of
from nlscale.optim.period import at_period

RECIPE = "hope-340m-muon"
COLORS = ("#0072B2", "#009E73", "#E69F00", "#D55E00")


@dataclass(frozen=True)
class Memory:
    """A moving average of gradients that a rule keeps."""

    name: str
    beta: Callable[[OptimizerConfig], float]
    every: Callable[[OptimizerConfig], int] = lambda own: 1
    """Updates of the level between two of its own."""

    def steps(self, own: OptimizerConfig, period: int) -> float:
        """Half-life, in steps, at a level of that period."""
        return period * self.every(own) * math.log(2) / -math.log(self.beta(own))


MEMORIES = (
    Memory("adamw, first moment", lambda own: own.beta1),
    Memory("adamw, second moment", lambda own: own.beta2),
    Memory("muon, delta, deep", lambda own: own.muon.momentum),
    Memory("m3, fast", lambda own: own.m3.momentum),
    Memory("m3, second moment", lambda own: own.m3.second_moment),
    Memory("m3, slow", lambda own: own.m3.slow_momentum, lambda own: own.m3.every),
)


def rows() -> list[str]:
    """A line of markdown for each memory: its half-life at each level, in steps."""
    config = load(RECIPE, []).config
    lines = []
    for memory in MEMORIES:
        cells = []
        for by_period in (False, True):
            own = replace(config.optimizer, betas_by_period=by_period)
            for level in levels_of(config):
                half = memory.steps(at_period(own, level.period), level.period)
                cells.append(f"{half:,.0f}" if half >= 100 else f"{half:.3g}")
        lines.append(f"| {memory.name} | {' | '.join(cells)} |")
    return lines


def draw(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config = load(RECIPE, []).config
    own, run = config.optimizer, config.train.steps
    per_step = tokens_per_step(config)
    assert per_step is not None
    levels = levels_of(config)
    figure, axes = plt.subplots(figsize=(10, 4.6))
    names = ["window of the level", *(memory.name for memory in MEMORIES)]
    for level, color in zip(levels, COLORS, strict=True):
        label = f"{level.name}, period {level.period}"
        halves = [memory.steps(own, level.period) for memory in MEMORIES]
        axes.axvline(level.period, color=color, linewidth=0.8, alpha=0.5, zorder=1)
        axes.scatter(level.period, 0, color=color, marker="s", s=52, zorder=3, label=label)
        axes.scatter(halves, range(1, len(names)), color=color, s=52, zorder=3)
    by_period = replace(own, betas_by_period=True)
    period = levels[0].period
    same = [
        (memory.steps(own, period), row)
        for row, memory in enumerate(MEMORIES, 1)
        if memory.beta(at_period(by_period, 2)) != memory.beta(own)
    ]
    axes.scatter(
        *zip(*same, strict=True), facecolors="none", edgecolors="black", s=150, linewidth=1.2,
        zorder=2, label="all levels, with betas_by_period",
    )  # fmt: skip
    axes.axvline(run, color="#8C8C8C", linestyle="--", linewidth=1)
    axes.text(run, 0.5, "end of the run ", ha="right", va="center", color="#5C5C5C")
    axes.set_xscale("log")
    axes.set_xlim(0.8, 1.3 * run)
    axes.set_xlabel(
        f"steps of {RECIPE}: length of a window; in which the weight of a gradient falls to half"
    )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.3, -0.6)
    axes.grid(axis="y", color="#EDEDED", zorder=0)
    axes.tick_params(axis="y", length=0)
    for side in ("right", "left"):
        axes.spines[side].set_visible(False)
    tokens = axes.secondary_xaxis(
        "top", functions=(lambda steps: steps * per_step, lambda count: count / per_step)
    )
    tokens.set_xlabel("tokens")
    axes.legend(
        frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.42, -0.16), ncols=3
    )
    figure.tight_layout()
    figure.savefig(out, dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw it, in place of the table")
    args = parser.parse_args()
    if args.out is None:
        print("\n".join(rows()))
    else:
        draw(args.out)
        print(args.out)


if __name__ == "__main__":
    main()
