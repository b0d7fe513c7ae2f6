"""What levels in host memory take and free, against what a run holds; and the largest model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import world
from ops.plain_ops import stand_in
from plan.live import Live

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.nvme import NvmeTier
from nlscale.levels.slots import slot_bytes
from nlscale.levels.spectrum import levels_of, sync_group
from nlscale.plan.largest import fits_on, largest, of_size
from nlscale.plan.on_cluster import check
from nlscale.plan.plan import make_plan

VOCABULARY = 64
ONE = Cluster(
    name="one", nodes=1, gpus_per_node=1, inter_node_gbit=100, gpu_memory_gib=1, pcie_gbyte=2.0
)


def make(*overrides: str) -> Config:
    return recipe.load(
        None,
        [
            "data.dir=none", "data.sequence_length=16", f"model.vocabulary={VOCABULARY}",
            "model.layers=4", "model.d_model=64", "model.heads=4", "train.global_batch=4",
            "train.dtype=bf16", "tiers.ring_mib=0.0625",
            "levels=[{period: 1}, {period: 2, memory: host}, {period: 4, memory: host}]",
            *overrides,
        ],
    ).config  # fmt: skip


IN_HBM = ["levels.spectrum.1.memory=hbm", "levels.spectrum.2.memory=hbm"]
SMALL = ["model.layers=2"]
WHERE = {
    "hbm": IN_HBM,
    "host": [],
    "nvme": ["levels.spectrum.1.memory=nvme", "levels.spectrum.2.memory=nvme"],
}


@dataclass
class Held:
    """Bytes that a rank holds."""

    host: int
    """In host memory."""
    ring: int
    state: int
    """Of fp32 weights and what rules keep of them, on the device, the ring included."""
    between: int
    """Of all storages on the device between two steps."""
    peak: int
    """Likewise, at most in a cycle of steps."""


def bytes_held(dtype: str, folder: Path) -> dict[str, Held]:
    """On a rank of a world: of each memory what is held, in turn."""
    from nlscale.parallel.layout import process_groups

    stand_in()
    found, of_all = {}, [*SMALL, f"train.dtype={dtype}", f"tiers.folder={folder}"]
    with process_groups(make(*of_all)) as layout:
        for memory, where in WHERE.items():
            found[memory] = held(make(*of_all, *where), layout)
    return found


def held(config: Config, layout: Any) -> Held:
    """See `bytes_held`."""
    import gc

    import torch

    from nlscale.bench.tiers import _Run
    from nlscale.step.micro_batches import Batch

    tokens = torch.zeros(4, 16, dtype=torch.long)
    with Live([]) as live:
        run = _Run.of(config, VOCABULARY, layout)
        gc.collect()
        live.peak = live.now
        for _ in range(5):  # a cycle, and once more with all that it has made
            run.trainer.take_step([Batch(tokens, tokens, 4)])
        gc.collect()
        tiers = [g.optimizer.tier for g in run.trainer.optimizer.groups if g.optimizer.tier]
        buffers = [b.memory for t in tiers[:1] if isinstance(t, NvmeTier) for b in t.drive._made]
        # what is on a drive is no tensor that was made, but its views are
        elsewhere = [own.untyped_storage() for own in (*(t._memory for t in tiers), *buffers)]
        away = sum(own.nbytes() for own in elsewhere if own._cdata in live.known)
        return Held(
            host=sum(x.nbytes for x in buffers or [tier._memory for tier in tiers]),
            ring=tiers[0].ring.nbytes if tiers else 0,
            state=run.state_bytes(),
            between=live.now - away,
            peak=live.peak - away,
        )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_bytes_of_host_ring_and_device_are_those_held(dtype: str, tmp_path: Path) -> None:
    of_all = [*SMALL, f"train.dtype={dtype}", f"tiers.folder={tmp_path}"]
    plans = {where: make_plan(make(*of_all, *keys), ONE) for where, keys in WHERE.items()}
    (found,) = world.run(1, bytes_held, dtype, tmp_path)
    resident, on_hbm = plans["hbm"], found["hbm"]
    assert resident.host is None and on_hbm.host == on_hbm.ring == 0
    for memory in ("host", "nvme"):
        plan, own = plans[memory].host, found[memory]
        assert plan is not None
        assert plan.gpu_bytes == plan.node_bytes
        if memory == "host":
            assert own.host == plan.gpu_bytes == sum(level.host_bytes for level in plan.levels)
        else:
            assert own.host == 2 * slot_bytes(int(plan.gpu_bytes) // 2, make().tiers.threads)
        assert own.ring == pytest.approx(plan.ring_bytes, rel=1e-3)
        less = plan.freed_bytes - plan.ring_bytes
        assert on_hbm.state - own.state == pytest.approx(less, rel=0.02)
        assert on_hbm.between - own.between == pytest.approx(less, rel=0.02)
        assert on_hbm.peak - own.peak == pytest.approx(less, rel=0.1)
        planned = resident.memory.largest.optimizer - plans[memory].memory.largest.optimizer
        assert planned == less


@pytest.mark.parametrize("more", [[], ["parallel.pipeline=2"], ["parallel.shard_optimizer=all"]])
def test_a_step_waits_for_what_comes_in(more: list[str]) -> None:
    config = make("train.global_batch=16", "train.micro_batch=1", *more)
    cluster = replace(ONE, nodes=2, gpus_per_node=2)
    host = make_plan(config, cluster).host
    assert host is not None
    pipeline = config.parallel.pipeline
    shares = {"node": 2, "all": 4}[config.parallel.shard_optimizer.value]
    if pipeline == 2:
        shares = 2  # ranks of a node, of one stage
    levels = levels_of(config)
    hidden = {level.index: 0 for level in levels}
    for level, plan in zip(levels, make_plan(config, cluster).levels, strict=True):
        hidden[level.index] = plan.parameters // 4  # a block's, of a slow level: its MLP
    worst, total = 0.0, 0.0
    for rank in range(pipeline):
        blocks = range(rank * 4 // pipeline, (rank + 1) * 4 // pipeline)
        steps = []
        for step in range(1, 5):
            due = [
                12 * hidden[level.index]
                for level in levels[1:]
                for depth in blocks
                if sync_group(level, depth, 4, True).due(step)
            ]
            steps.append(sum(due) / shares)
        worst, total = max(worst, *steps), max(total, sum(steps) / 4)
    assert host.waited_peak_seconds == pytest.approx(worst / 2e9)
    assert host.waited_seconds_per_step == pytest.approx(total / 2e9)
    assert host.streamed_peak_bytes == pytest.approx(2 * worst)


def test_what_cannot_be_streamed_is_refused_with_a_way_out() -> None:
    for keys, said in (
        (["levels.spectrum.1.optimizer={rule: muon}"], "whole matrices; use"),
        (["levels.spectrum.2.outer.every=2"], "memory=host: .*outer.every=null"),
    ):
        with pytest.raises(UserError, match=said):
            check(make(*keys), ONE, VOCABULARY)
    check(make("levels.spectrum.0.optimizer={rule: muon}"), ONE, VOCABULARY)


def test_a_node_without_the_memory_does_not_fit() -> None:
    config, need = make(), make_plan(make(), ONE).host
    assert need is not None
    gib = need.node_bytes / 2**30
    assert make_plan(config, replace(ONE, host_memory_gib=gib / 0.89)).fits
    assert not make_plan(config, replace(ONE, host_memory_gib=gib / 0.91)).fits


def test_the_largest_is_the_last_that_fits() -> None:
    config = make(*IN_HBM, "tiers.ring_mib=4", "model.hidden=960")
    cluster = replace(ONE, gpu_memory_gib=0.2, host_memory_gib=64.0)
    on_gpu, on_host = largest(config, cluster)
    assert on_gpu is not None and on_host is not None
    assert on_gpu.host_gib == 0 < on_host.host_gib
    assert on_gpu.parameters < on_host.parameters
    assert on_gpu.gpu_gib <= 0.9 * 0.2 and on_host.gpu_gib <= 0.9 * 0.2
    by_hand = [n for n in range(1, 40) if fits_on(of_size(config, n), cluster)]
    assert on_gpu.layers == max(by_hand)
    wide = of_size(config, 8).model
    assert (wide.d_model, wide.heads, wide.hidden) == (128, 8, 1920)
    with pytest.raises(UserError, match=r"parallel\.stages"):
        largest(make("parallel.pipeline=2", "parallel.stages=[1,3]"), cluster)


def test_interleaved_phases_stream_as_much_at_each_step_on_every_stage() -> None:
    """By depth a stage of four has a quarter of the period for all that it streams."""
    four = replace(ONE, gpus_per_node=4)
    keys = ["model.layers=16", "parallel.pipeline=4", "train.micro_batch=1"]
    keys.append("levels=[{period: 1}, {period: 4, memory: host}]")
    plans = [
        make_plan(make(*keys, f"levels.phases={phases}"), four).host
        for phases in ("by_depth", "interleaved")
    ]
    for plan, times in zip(plans, (4, 1), strict=True):
        assert plan is not None
        peak, mean = plan.streamed_peak_bytes, plan.streamed_bytes_per_step
        assert peak == pytest.approx(times * mean, rel=1e-6)
    assert plans[0] is not None and plans[1] is not None
    assert plans[0].streamed_bytes_per_step == plans[1].streamed_bytes_per_step
