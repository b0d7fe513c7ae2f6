"""Every process group of a run waits as long as the configuration's timeouts say."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
import world
from levels.level_runs import load

from nlscale.parallel.layout import process_groups

LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "train.global_batch=4", "model.layers=4"]


def waits() -> list[float]:
    """Seconds that each group of this rank waits."""
    two_hours = ["timeouts.startup=60", "timeouts.step=60", "timeouts.checkpoint=7200"]
    with process_groups(load([*LAYOUT, *two_hours])):
        found = []
        for group in dist.distributed_c10d._world.pg_map:
            options = group._get_backend(torch.device("cpu")).options
            found.append(options._timeout / datetime.timedelta(seconds=1))
        return found


def test_timeouts_reach_every_group() -> None:
    for seconds in world.run(8, waits, ranks_per_node=4):
        assert len(seconds) >= 8  # all, tensor, pipeline, data, in and between nodes, host
        assert min(seconds) >= 7200
