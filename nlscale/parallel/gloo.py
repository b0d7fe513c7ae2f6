"""Network devices of the gloo groups of a process: one for all of them, but for large groups.

torch makes a device for each gloo group, with a thread that wakes a hundred times a second, work or
none, and megatron-core makes some thirty groups. Where the ranks of a run share few cores, a third
of these went to such threads.

On a common device every rank connects to every other one as soon as there is a group, and asks the
store for each: the square of the ranks, in sockets and requests. A large group has a device of its
own instead, on which two ranks connect when one first has something for the other: in most of what
is done with a group, that is a number of others that grows with the logarithm of the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

_c10d: Any = distributed_c10d
_gloo: Any = ProcessGroupGloo
_LARGE = 64
"""Ranks of the largest group that connects at once: in a third of a second, by 63 sockets each."""


@contextmanager
def one_device() -> Iterator[None]:
    """The gloo groups that are made inside share a device, those of at most 64 ranks.

    It is that of the interface in GLOO_SOCKET_IFNAME, if that is set; where several are listed
    there, separated by commas, it is one of each.
    """
    common = _devices(lazy=False)

    class Sharing(ProcessGroupGloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            options = _gloo._Options()
            # gloo tells connections that come later apart by rank alone: one group a device
            options._devices = _devices(lazy=True) if size > _LARGE else common
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    _c10d.ProcessGroupGloo = Sharing
    try:
        yield
    finally:
        _c10d.ProcessGroupGloo = ProcessGroupGloo


def _devices(lazy: bool) -> list[Any]:
    named = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [ProcessGroupGloo.create_device(interface=name, lazy_init=lazy) for name in named]
    return devices or [ProcessGroupGloo.create_default_device(lazy_init=lazy)]
