"""Groups of one rank that are there inside `alone`, and nowhere after it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from megatron.core import parallel_state

from nlscale.parallel.alone import alone


def ranks_seen() -> tuple[int, int, int, int]:
    """Ranks and sizes as layers ask for them, and as a mixer that always reduces sees them."""
    group = parallel_state.get_tensor_model_parallel_group()
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        dist.get_world_size(),
        int(total),
    )


def nothing_left() -> bool:
    return not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def entered_in_every_way() -> list[Any]:
    """On a rank, where nothing has begun process groups."""
    found: list[Any] = [nothing_left()]
    with alone():
        with alone():
            found.append(ranks_seen())
        found.append(ranks_seen())
    found.append(nothing_left())
    with pytest.raises(RuntimeError), alone():
        raise RuntimeError
    found.append(nothing_left())
    # one thread enters before another has left, and stays longer
    left, seen = threading.Event(), []

    def stay() -> None:
        with alone():
            entered.set()
            left.wait(60)
            seen.append(ranks_seen())

    entered, thread = threading.Event(), threading.Thread(target=stay)
    with alone():
        thread.start()
        entered.wait(60)
    left.set()
    thread.join()
    return [*found, *seen, nothing_left()]


def test_it_is_there_inside_and_gone_after() -> None:
    (found,) = world.run(1, entered_in_every_way)
    one = (0, 1, 1, 1)
    assert found == [True, one, one, True, True, one, True]
