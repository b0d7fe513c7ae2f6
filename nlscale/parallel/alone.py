"""Groups of one rank for megatron-core's layers, in a process that is no rank of a run.

The layers look for a default process group of torch.distributed and for the groups of megatron's
`parallel_state`, when they are made and in every forward pass. Inside `alone` they find a group of
this process alone, which is registered nowhere; after it both libraries are as they were. So the
process may have groups of its own before, or make and end them later.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

_STATE: Any = parallel_state
_GROUPS = (
    "_TENSOR_MODEL_PARALLEL_GROUP",
    "_PIPELINE_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP",
)
"""Where megatron-core keeps those that layers ask for."""
_lock = threading.Lock()
_inside = 0
"""How many times it is entered: threads may each use a model of their own."""
_before: list[Any] = []
"""What stood in all these places when it was entered first."""


@contextmanager
def alone() -> Iterator[None]:
    """Within, megatron-core's layers take this process for the only rank there is.

    Enter it to make a model, and each time to call it. It can be nested, and entered by several
    threads at once.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _enter()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _leave()


def _enter() -> None:
    _before[:] = [dist.group.WORLD, *(getattr(_STATE, name) for name in _GROUPS)]
    group = _group_of_one()
    if dist.group.WORLD is None:
        dist.group.WORLD = group
    for name in _GROUPS:
        setattr(_STATE, name, group)


def _leave() -> None:
    dist.group.WORLD, *groups = _before
    for name, group in zip(_GROUPS, groups, strict=True):
        setattr(_STATE, name, group)


@cache
def _group_of_one() -> dist.ProcessGroup:
    """Over gloo, for a mixer that reduces over its group however small that is."""
    store = dist.HashStore()
    group = dist.ProcessGroup(store, 0, 1)
    gloo = dist.ProcessGroupGloo(store, 0, 1, timedelta(minutes=1))
    for device in ("cpu", "cuda"):
        kind = dist.ProcessGroup.BackendType.GLOO
        group._register_backend(torch.device(device), kind, gloo)
    return group
