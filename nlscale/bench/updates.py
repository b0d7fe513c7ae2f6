"""`nlscale bench optimizer`: an update by each optimizer rule beside one by AdamW."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.bench.clock import name_of
from nlscale.bench.progress import each
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.kept import kept_by_depth
from nlscale.levels.optimizers import GroupOptimizer, main_parameters
from nlscale.levels.passes import matrices_by_level
from nlscale.levels.spectrum import levels_of
from nlscale.ops import moments
from nlscale.parallel.layout import Layout, process_groups
from nlscale.step.trainer import Trainer

_WARM_UP = 2


def bench_optimizer(beside: Config, configs: list[Config], repeats: int) -> dict[str, Any]:
    """Time updates of all parameters of a model, of every level at once, on random gradients.

    Of each rule in turn with AdamW, warm; medians. Where updates differ, as every
    `optimizer.m3.every`-th of m3 does, one time is of as many as repeat, divided by them. What
    comes before and after is not timed: norms, clipping, and what ranks send each other. All
    matrices are on this process, which in a run of several ranks share them.

    Args:
        beside: the run under AdamW.
        configs: which differ from it in their rule.
        repeats: times.

    Returns:
        What was measured on, and for each rule `update_seconds`, `beside_seconds` of AdamW in
        between, `ratio` of these; `newton_schulz_flops` of an update, the mean, and `state_bytes`
        that the rule keeps.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read).
    """
    vocabulary = beside.model.vocabulary
    if vocabulary is None:
        raise UserError("bench optimizer reads no data: give model.vocabulary=256, for example")
    rows = []
    with process_groups(beside) as layout:
        yardstick = _Updates.of(beside, vocabulary, layout)
        for config in each("optimizer", configs, lambda config: config.optimizer.rule):
            own = _Updates.of(config, vocabulary, layout)
            own_seconds, beside_seconds = _alternate([own, yardstick], repeats)
            rows.append(
                {
                    "rule": config.optimizer.rule,
                    "update_seconds": own_seconds,
                    "beside_seconds": beside_seconds,
                    "ratio": own_seconds / beside_seconds,
                    "newton_schulz_flops": config.model.layers
                    * sum(level.flops for level in matrices_by_level(config)),
                    "state_bytes": sum(map(sum, kept_by_depth(config, vocabulary))),
                }
            )
            del own
            gc.collect()  # or the next one has less room
        parameters = sum(p.numel() for g in yardstick.groups for p in main_parameters(g))
    return {
        "device": name_of(layout.device),
        "dtype": beside.train.dtype.value,
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "repeats": repeats,
        "beside": beside.optimizer.rule,
        "rows": rows,
    }


@dataclass
class _Updates:
    """A model whose levels can be updated."""

    groups: list[GroupOptimizer]
    turns: int
    """Updates after which they repeat."""
    device: torch.device

    @classmethod
    def of(cls, config: Config, vocabulary: int, layout: Layout) -> _Updates:
        levels = levels_of(config)
        trainer = Trainer.build(config, layout, levels, vocabulary)
        generator = torch.Generator(layout.device).manual_seed(config.run.seed)
        for g in trainer.optimizer.groups:
            inner: Any = g.optimizer.optimizer
            inner.updates = 0
            inner.found_inf = torch.zeros((), device=layout.device)
            for group in inner.param_groups:
                group["lr"] = config.optimizer.learning_rate * group["lr_mult"]
            for p in main_parameters(g):
                p.grad = torch.randn(p.shape, device=p.device, generator=generator)
        turns = max(level.turns for level in matrices_by_level(config))
        return cls(trainer.optimizer.groups, turns, layout.device)

    def seconds(self) -> tuple[moments.Moment, moments.Moment]:
        """When some updates begin and end."""
        began = moments.now(self.device)
        for _ in range(self.turns):
            for g in self.groups:
                inner: Any = g.optimizer.optimizer
                inner.step()
                inner.updates += 1
        return began, moments.now(self.device)


def _alternate(both: list[_Updates], repeats: int) -> list[float]:
    """Median seconds of an update of each; on a GPU by its own clock, while the host is ahead."""
    marks = [[updates.seconds() for updates in both] for _ in range(_WARM_UP + repeats)]
    if both[0].device.type == "cuda":
        torch.cuda.synchronize(both[0].device)
    return [
        statistics.median(moments.seconds_between(*mark) for mark in column[_WARM_UP:])
        / updates.turns
        for updates, column in zip(both, zip(*marks, strict=True), strict=True)
    ]


def print_optimizer(result: dict[str, Any]) -> None:
    """Print what `bench_optimizer` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rule")
    beside = result["beside"]
    for name in ("an update", beside, f"of {beside}'s", "Newton-Schulz", "keeps"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        flops = row["newton_schulz_flops"]
        table.add_row(
            row["rule"],
            *(f"{1e3 * row[name]:.2f}" for name in ("update_seconds", "beside_seconds")),
            f"{row['ratio']:.2f}",
            f"{human_count(flops)} FLOPs" if flops else "",
            human_bytes(row["state_bytes"]),
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"updates of {human_count(result['parameters'])} parameters on {result['device']}, "
        f"{result['dtype']}; milliseconds, median of {result['repeats']}\n"
    )
    console.print(table)
