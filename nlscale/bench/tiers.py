"""`nlscale bench tiers`: training steps with the state of slow levels in host memory, and without.

The same model is trained twice in one run, in turn, step by step, on the same random tokens: with
all state on the device, and with that of each level of a period above 1 in host memory
(docs/concepts/tiers.md). Which of the two comes first changes from step to step, so that whatever
else the machine does meets both alike.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.bench.clock import name_of, now
from nlscale.bench.progress import each
from nlscale.bench.tokens import random_tokens
from nlscale.cluster.machines import Cluster
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.ring_pieces import on_host
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_parameters
from nlscale.parallel.layout import Layout, process_groups
from nlscale.plan.host_memory import HostPlan, host_plan
from nlscale.plan.largest import slow_on_host, state_on_gpu
from nlscale.plan.traffic import cycle_steps
from nlscale.step.trainer import Trainer

_WARM_UP = 1
"""Cycles of the periods before the first that counts."""


def bench_tiers(config: Config, cycles: int) -> dict[str, Any]:
    """Time whole steps over whole cycles of the periods, in both memories in turn.

    A step ends when the device has done all of it, what it copies back to the host included: longer
    than in training, where the next step hides the end of that.

    Args:
        config: of the run, which says where no level's state lies.
        cycles: of the periods, to time.

    Returns:
        What was measured on, `cycle_steps`, `levels` whose state is moved, and
        - `hbm_step_seconds`, `host_step_seconds`: the mean over a cycle, the median of the cycles
        - `ratio`: host to hbm in the same cycle, the median; `ratios`: of each cycle
        - `added_seconds_peak`: of the step of a cycle at which host takes longest beyond hbm, each
          the median of the cycles
        - `streamed_bytes_per_step`, `streamed_peak_bytes`: that a rank copied in and out together,
          of the rank that copied most; `planned_` the same by the plan, and `streamed_ratio`
        - `state_bytes_hbm`, `state_bytes_host`: fp32 weights and what rules keep that lie on the
          device, the ring included, of the fullest rank; `saved_bytes`, `planned_saved_bytes`
        - `same_losses`: whether all losses of the two are the same, to the bit.
        Of a run in stages the largest is measured.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read), or no level can be moved.
    """
    vocabulary = config.model.vocabulary
    if vocabulary is None:
        raise UserError("bench tiers reads no data: give model.vocabulary=256, for example")
    config = at_stage(config, largest(config))
    levels = levels_of(config)
    cycle = cycle_steps(levels)
    steps = (_WARM_UP + cycles) * cycle
    config.train.steps = steps + 1  # the last step of a run updates every level
    host = slow_on_host(config)
    moved = [level.name for level, own in zip(levels, on_host(host), strict=True) if own]
    if not moved:
        raise UserError(
            "bench tiers moves the state of levels of a period above 1 to host memory, and this "
            "run has none whose state can be streamed; try levels=[1,4] optimizer.rule=adamw"
        )
    with process_groups(config) as layout:
        cluster = Cluster("here", layout.nodes, layout.world // layout.nodes, 1.0, 1.0)
        planned = host_plan(host, levels, vocabulary, cluster, layout.data_size)
        assert planned is not None
        both = {
            name: _Run.of(own, vocabulary, layout)
            for name, own in (("hbm", state_on_gpu(config)), ("host", host))
        }
        for part in each("tiers", range(_WARM_UP + cycles), lambda n: f"cycle {n + 1}"):
            for step in range(part * cycle + 1, (part + 1) * cycle + 1):
                data = (layout.data_rank, layout.data_size, layout.device)
                batches = random_tokens(config, step, *data)
                order = list(both.values())
                for run in order if step % 2 else reversed(order):
                    run.step(batches)
        first = _WARM_UP * cycle
        held = [run.state_bytes() for run in both.values()]
        streamed = both["host"].streamed[first:]
        found = torch.tensor([*held, sum(streamed), max(streamed)], device=layout.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return {
        "device": name_of(layout.device),
        "dtype": config.train.dtype.value,
        "ranks": layout.world,
        "threads": torch.get_num_threads(),
        "parameters": sum(level_parameters(config, vocabulary)),
        "cycle_steps": cycle,
        "cycles": cycles,
        "levels": moved,
        **_times(both["hbm"].seconds[first:], both["host"].seconds[first:], cycle),
        **_bytes(found.tolist(), cycles * cycle, planned),
        "same_losses": both["hbm"].losses == both["host"].losses,
    }


@dataclass
class _Run:
    """A model that is trained, and what each of its steps took."""

    trainer: Trainer
    layout: Layout
    seconds: list[float]
    streamed: list[int]
    """Bytes in and out."""
    losses: list[float]

    @classmethod
    def of(cls, config: Config, vocabulary: int, layout: Layout) -> _Run:
        return cls(Trainer.build(config, layout, levels_of(config), vocabulary), layout, [], [], [])

    def step(self, batches: Any) -> None:
        torch.distributed.barrier(group=self.layout.host)
        began, before = now(self.layout.device), self._streamed()
        verdict, _ = self.trainer.take_step(batches)
        self.seconds.append(now(self.layout.device) - began)
        self.streamed.append(self._streamed() - before)
        self.losses.append(verdict.loss)

    def state_bytes(self) -> int:
        """Of fp32 weights and what rules keep of them, on this rank's device, as it is held now.

        In fp32 the weights are the model's own, and not counted.
        """
        optimizer = self.trainer.optimizer
        resident = {g.group for g in optimizer.groups if g.optimizer.tier is None}
        model = {_storage(p) for p in self.trainer.named_parameters().values()}
        held = {
            _storage(tensor)
            for shard in self.trainer.shards()
            if shard.group in resident
            for tensor in (shard.weights, *shard.state().values())
        }
        return sum(size for _, size in held - model) + sum(ring.nbytes for ring in self._rings())

    def _streamed(self) -> int:
        return sum(ring.streamed for ring in self._rings())

    def _rings(self) -> list[Any]:
        tiers = [g.optimizer.tier for g in self.trainer.optimizer.groups]
        rings = {id(tier.ring): tier.ring for tier in tiers if tier is not None}
        return [*rings.values()]


def _storage(tensor: Any) -> tuple[int, int]:
    """Where the memory of a tensor begins, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _times(hbm: list[float], host: list[float], cycle: int) -> dict[str, Any]:
    """Of the seconds of whole cycles."""
    by_cycle = [torch.tensor(own, dtype=torch.float64).view(-1, cycle) for own in (hbm, host)]
    means = [own.mean(1).tolist() for own in by_cycle]
    ratios = [after / before for before, after in zip(*means, strict=True)]
    added = by_cycle[1] - by_cycle[0]
    return {
        "hbm_step_seconds": statistics.median(means[0]),
        "host_step_seconds": statistics.median(means[1]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "added_seconds_peak": max(statistics.median(column) for column in added.T.tolist()),
    }


def _bytes(found: list[int], steps: int, planned: HostPlan) -> dict[str, Any]:
    """Of what ranks hold in both memories, and copied in those steps together and at most."""
    hbm, host, streamed, peak = found
    return {
        "streamed_bytes_per_step": streamed / steps,
        "planned_streamed_bytes_per_step": planned.streamed_bytes_per_step,
        "streamed_ratio": streamed / steps / planned.streamed_bytes_per_step,
        "streamed_peak_bytes": peak,
        "planned_streamed_peak_bytes": planned.streamed_peak_bytes,
        "state_bytes_hbm": hbm,
        "state_bytes_host": host,
        "saved_bytes": hbm - host,
        "planned_saved_bytes": planned.freed_bytes - planned.ring_bytes,
    }


def print_tiers(result: dict[str, Any]) -> None:
    """Print what `bench_tiers` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "hbm", "host", "of hbm"):
        table.add_column(name, justify="right" if name else "left")
    times = [1e3 * result[f"{tier}_step_seconds"] for tier in ("hbm", "host")]
    table.add_row("a step, ms", *(f"{own:.2f}" for own in times), f"{result['ratio']:.3f}")
    sizes = [result[f"state_bytes_{tier}"] for tier in ("hbm", "host")]
    table.add_row("state on the device", *map(human_bytes, sizes), f"{sizes[1] / sizes[0]:.3f}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{human_count(result['parameters'])} parameters on {result['device']}, ranks: "
        f"{result['ranks']}, {result['dtype']}; in host memory: {', '.join(result['levels'])}\n"
        f"{result['cycles']} cycle{'s' * (result['cycles'] > 1)} of {result['cycle_steps']} steps, "
        f"medians of their means\n"
    )
    console.print(table)
    console.print(
        f"\nin and out, a step: {human_bytes(result['streamed_bytes_per_step'])}, plan "
        f"{human_bytes(result['planned_streamed_bytes_per_step'])}\nthe largest step: "
        f"{human_bytes(result['streamed_peak_bytes'])}, plan "
        f"{human_bytes(result['planned_streamed_peak_bytes'])}; it takes "
        f"{1e3 * result['added_seconds_peak']:.2f} ms more\n"
        f"less on the device: {human_bytes(result['saved_bytes'])}, plan "
        f"{human_bytes(result['planned_saved_bytes'])}, the ring of host included; the losses are "
        f"{'the same' if result['same_losses'] else 'NOT the same'}"
    )
