"""`nlscale bench tiers`: training steps with the state of slow levels elsewhere, and without.

The same model is trained twice in one run, in turn, step by step, on the same random tokens: with
all state on the device, and with that of each level of a period above 1 in host memory or on a
drive (docs/concepts/tiers.md). Which of the two comes first changes from step to step, so that
whatever else the machine does meets both alike.
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
from nlscale.cluster.life.place import place
from nlscale.cluster.machines import Cluster
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Config, Tier
from nlscale.errors import UserError
from nlscale.levels.nvme import NvmeTier
from nlscale.levels.ring_pieces import off_device
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_parameters
from nlscale.parallel.layout import Layout, process_groups
from nlscale.plan.checks import check_sizes
from nlscale.plan.host_memory import HostPlan, host_plan
from nlscale.plan.largest import slow_in, state_on_gpu
from nlscale.plan.nvme import nvme_plan
from nlscale.plan.traffic import cycle_steps
from nlscale.step.trainer import Trainer
from nlscale.train.tiers_here import check_tiers_here

_WARM_UP = 1
"""Cycles of the periods before the first that counts."""


def bench_tiers(config: Config, cycles: int, memory: Tier = Tier.host) -> dict[str, Any]:
    """Time whole steps over whole cycles of the periods, in both memories in turn.

    A step ends when the device has done all of it, what it copies back to the host included: longer
    than in training, where the next step hides the end of that. Drives go on meanwhile.

    Args:
        config: of the run, which says where no level's state lies.
        cycles: of the periods, to time.
        memory: where the state of slow levels lies in one of the two.

    Returns:
        What was measured on, `cycle_steps`, `memory`, `levels` whose state is moved, and, where
        `host` stands for the memory,
        - `hbm_step_seconds`, `host_step_seconds`: the mean over a cycle, the median of the cycles
        - `ratio`: host to hbm in the same cycle, the median; `ratios`: of each cycle
        - `added_seconds_peak`: of the step of a cycle at which host takes longest beyond hbm, each
          the median of the cycles
        - `streamed_bytes_per_step`, `streamed_peak_bytes`: that a rank copied in and out together,
          of the rank that copied most; `planned_` the same by the plan, and `streamed_ratio`
        - `state_bytes_hbm`, `state_bytes_host`: fp32 weights and what rules keep that lie on the
          device, the ring included, of the fullest rank; `saved_bytes`, `planned_saved_bytes`
        - `drive_bytes_per_step`, `planned_drive_bytes_per_step`: read and written together, by the
          rank that did most; 0 in host memory
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
    config.checkpoint.every, config.checkpoint.steps = None, []  # nor does it save
    host = slow_in(config, memory)
    moved = [level.name for level, own in zip(levels, off_device(host), strict=True) if own]
    if not moved:
        raise UserError(
            "bench tiers moves the state of levels of a period above 1 elsewhere, and this run has "
            "none whose state can be streamed; try levels=[1,4] optimizer.rule=adamw"
        )
    check_tiers_here(host, vocabulary, check_sizes(host, place().world))
    with process_groups(config) as layout:
        cluster = Cluster("here", layout.nodes, layout.world // layout.nodes, 1.0, 1.0)
        given = (host, levels, vocabulary, cluster, layout.data_size)
        planned, drives = host_plan(*given), nvme_plan(*given)
        assert planned is not None
        both = {
            name: _Run.of(own, vocabulary, layout)
            for name, own in (("hbm", state_on_gpu(config)), ("moved", host))
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
        streamed, on_drive = both["moved"].streamed[first:], both["moved"].on_drive[first:]
        counts = [*held, sum(streamed), max(streamed), sum(on_drive)]
        found = torch.tensor(counts, device=layout.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return {
        "device": name_of(layout.device),
        "dtype": config.train.dtype.value,
        "ranks": layout.world,
        "threads": torch.get_num_threads(),
        "parameters": sum(level_parameters(config, vocabulary)),
        "cycle_steps": cycle,
        "cycles": cycles,
        "memory": memory.value,
        "levels": moved,
        **_times(both["hbm"].seconds[first:], both["moved"].seconds[first:], cycle, memory),
        **_bytes(found.tolist(), cycles * cycle, planned, memory),
        "planned_drive_bytes_per_step": 0.0 if drives is None else 2 * drives.mean_bytes,
        "same_losses": both["hbm"].losses == both["moved"].losses,
    }


@dataclass
class _Run:
    """A model that is trained, and what each of its steps took."""

    trainer: Trainer
    layout: Layout
    seconds: list[float]
    streamed: list[int]
    """Bytes in and out."""
    on_drive: list[int]
    """Bytes read and written since the step before: also while the other run took its own."""
    losses: list[float]
    driven: int = 0
    """Bytes read and written in all, after the last step."""

    @classmethod
    def of(cls, config: Config, vocabulary: int, layout: Layout) -> _Run:
        return cls(
            Trainer.build(config, layout, levels_of(config), vocabulary), layout, [], [], [], []
        )

    def step(self, batches: Any) -> None:
        torch.distributed.barrier(group=self.layout.host)
        before = self._streamed()
        began = now(self.layout.device)
        verdict, _ = self.trainer.take_step(batches)
        self.seconds.append(now(self.layout.device) - began)
        self.streamed.append(self._streamed() - before)
        driven = self._on_drive()
        self.on_drive.append(driven - self.driven)
        self.driven = driven
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

    def _on_drive(self) -> int:
        tiers = [g.optimizer.tier for g in self.trainer.optimizer.groups]
        drives = {t.drive for t in tiers if isinstance(t, NvmeTier)}
        return sum(drive.read_bytes + drive.written_bytes for drive in drives)

    def _rings(self) -> list[Any]:
        tiers = [g.optimizer.tier for g in self.trainer.optimizer.groups]
        rings = {id(tier.ring): tier.ring for tier in tiers if tier is not None}
        return [*rings.values()]


def _storage(tensor: Any) -> tuple[int, int]:
    """Where the memory of a tensor begins, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _times(hbm: list[float], host: list[float], cycle: int, memory: Tier) -> dict[str, Any]:
    """Of the seconds of whole cycles."""
    by_cycle = [torch.tensor(own, dtype=torch.float64).view(-1, cycle) for own in (hbm, host)]
    means = [own.mean(1).tolist() for own in by_cycle]
    ratios = [after / before for before, after in zip(*means, strict=True)]
    added = by_cycle[1] - by_cycle[0]
    return {
        "hbm_step_seconds": statistics.median(means[0]),
        f"{memory.value}_step_seconds": statistics.median(means[1]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "added_seconds_peak": max(statistics.median(column) for column in added.T.tolist()),
    }


def _bytes(found: list[int], steps: int, planned: HostPlan, memory: Tier) -> dict[str, Any]:
    """Of what ranks hold in both memories, and copied in those steps together and at most."""
    hbm, moved, streamed, peak, on_drive = found
    return {
        "streamed_bytes_per_step": streamed / steps,
        "planned_streamed_bytes_per_step": planned.streamed_bytes_per_step,
        "streamed_ratio": streamed / steps / planned.streamed_bytes_per_step,
        "streamed_peak_bytes": peak,
        "planned_streamed_peak_bytes": planned.streamed_peak_bytes,
        "state_bytes_hbm": hbm,
        f"state_bytes_{memory.value}": moved,
        "saved_bytes": hbm - moved,
        "planned_saved_bytes": planned.freed_bytes - planned.ring_bytes,
        "drive_bytes_per_step": on_drive / steps,
    }


def print_tiers(result: dict[str, Any]) -> None:
    """Print what `bench_tiers` returns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    memory = result["memory"]
    for name in ("", "hbm", memory, "of hbm"):
        table.add_column(name, justify="right" if name else "left")
    times = [1e3 * result[f"{tier}_step_seconds"] for tier in ("hbm", memory)]
    table.add_row("a step, ms", *(f"{own:.2f}" for own in times), f"{result['ratio']:.3f}")
    sizes = [result[f"state_bytes_{tier}"] for tier in ("hbm", memory)]
    table.add_row("state on the device", *map(human_bytes, sizes), f"{sizes[1] / sizes[0]:.3f}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{human_count(result['parameters'])} parameters on {result['device']}, ranks: "
        f"{result['ranks']}, {result['dtype']}; on {memory}: {', '.join(result['levels'])}\n"
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
        f"{human_bytes(result['planned_saved_bytes'])}, the ring of {memory} included; the losses "
        f"are {'the same' if result['same_losses'] else 'NOT the same'}"
    )
    if result["planned_drive_bytes_per_step"]:
        console.print(
            f"read and written, a step: {human_bytes(result['drive_bytes_per_step'])}, plan "
            f"{human_bytes(result['planned_drive_bytes_per_step'])}"
        )
