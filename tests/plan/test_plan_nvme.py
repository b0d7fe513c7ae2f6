"""What levels on drives take, write and wait for, against the sync groups counted one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan.test_plan_host_memory import ONE, make

from nlscale.levels.spectrum import levels_of, sync_group
from nlscale.plan.plan import make_plan

NVME = [
    "levels=[{period: 1}, {period: 2, memory: nvme}, {period: 4, memory: nvme}]",
    "tiers.folder=/nowhere",
    "train.steps=10",
]


@pytest.mark.parametrize("stagger", [True, False])
def test_bytes_and_seconds_are_those_of_the_groups(stagger: bool) -> None:
    config = make(*NVME, f"levels.stagger={str(stagger).lower()}")
    cluster = replace(ONE, nvme_gbyte=2.0, nvme_endurance_tb=1e-6)
    plan, host = make_plan(config, cluster), make_plan(make("levels.spectrum.0.memory=hbm"), ONE)
    assert plan.nvme is not None and plan.host is not None and host.host is not None
    sizes: dict = {}
    for level, own in zip(levels_of(config)[1:], plan.levels[1:], strict=True):
        for depth in range(4):
            group = sync_group(level, depth, 4, stagger)
            sizes[group] = sizes.get(group, 0) + 12 * own.parameters // 4
    total = sum(sizes.values())
    assert plan.nvme.gpu_bytes == plan.nvme.node_bytes == total == host.host.gpu_bytes
    assert plan.host.gpu_bytes == 2 * max(sizes.values()) and not plan.host.levels
    assert plan.host.freed_bytes == host.host.freed_bytes
    updates = {g: sum(g.due(step) or step == 10 for step in range(1, 11)) for g in sizes}
    assert plan.nvme.written_bytes == sum(sizes[g] * updates[g] for g in sizes)
    assert plan.nvme.endurance == pytest.approx(plan.nvme.written_bytes / 1e6)
    steps = range(5, 9)  # a cycle
    due = [[size for group, size in sizes.items() if group.due(step)] for step in steps]
    assert plan.nvme.stream_seconds_per_step == pytest.approx(sum(map(sum, due)) / 4 / 2e9)
    assert plan.nvme.stream_peak_seconds == pytest.approx(max(map(sum, due)) / 2e9)
    gaps = {True: 1, False: 2}[stagger]  # steps from one at which any is due to the next
    two = max(sum(sorted(own)[-2:]) for own in due)
    assert plan.nvme.hidden_from_seconds == pytest.approx(two / 2e9 / gaps)
    assert plan.nvme.waited_peak_seconds == 0


def test_the_host_gets_gradients_and_gives_weights_back() -> None:
    cpu = "levels=[{period: 1}, {period: 2}, {period: 4, memory: host, update: cpu}]"
    plan = make_plan(make(cpu), ONE)
    assert plan.host is not None and plan.nvme is None
    parameters = plan.levels[2].parameters
    assert plan.host.gpu_bytes == 12 * parameters
    assert plan.host.streamed_bytes_per_step == pytest.approx((4 + 2) * parameters / 4)
    assert plan.host.waited_seconds_per_step == pytest.approx(4 * parameters / 4 / 2e9)
    assert plan.host.ring_bytes == 0
    resident = make_plan(make("levels=[1,2,4]"), ONE)
    less = resident.memory.largest.optimizer - plan.memory.largest.optimizer
    assert less == plan.host.freed_bytes
