"""Large groups over gloo connect only those who have something for each other."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import world

from nlscale.config.vocabulary import Config
from nlscale.parallel import gloo
from nlscale.parallel.layout import process_groups

RANKS = 6


def sockets() -> int:
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum("socket:" in os.readlink(link) for link in links if os.path.islink(link))


def connect(largest: int) -> int:
    """Make groups, count this rank's new sockets, and use the groups in every way."""
    gloo._LARGE = largest
    with process_groups(Config()) as layout:
        dist.barrier(group=layout.host)
        before = sockets()
        with gloo.one_device():
            groups = [dist.new_group(backend="gloo") for _ in range(2)]
        new = sockets() - before
        dist.barrier(group=layout.host)
        for group in groups:
            told = [layout.rank]
            dist.broadcast_object_list(told, src=0, group=group)
            assert told == [0]
            everyones: list[int] = [0] * RANKS
            dist.all_gather_object(everyones, layout.rank, group=group)
            assert everyones == list(range(RANKS))
            gathered = [0] * RANKS if layout.rank == 3 else None
            dist.gather_object(layout.rank, gathered, dst=3, group=group)
            assert gathered in (None, list(range(RANKS)))
            total = torch.ones(1000)
            dist.all_reduce(total, group=group)
            assert torch.equal(total, torch.full((1000,), float(RANKS)))
            dist.barrier(group=group)
    return new


def test_a_large_group_connects_those_who_have_something_for_each_other() -> None:
    at_once = world.run(RANKS, connect, RANKS)
    assert min(at_once) >= 2 * (RANKS - 1)
    assert max(world.run(RANKS, connect, RANKS - 1)) < min(at_once)
