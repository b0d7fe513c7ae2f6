"""One network device for all gloo groups of a process.

torch makes a device for each gloo group, with a thread that wakes a hundred times a second, work or
none, and megatron-core makes some thirty groups. Where the ranks of a run share few cores, a third
of these went to such threads.
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


@contextmanager
def one_device() -> Iterator[None]:
    """The gloo groups that are made inside share a device.

    It is that of the interface in GLOO_SOCKET_IFNAME, if that is set; where several are listed
    there, separated by commas, it is one of each.
    """
    named = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [ProcessGroupGloo.create_device(interface=name) for name in named]
    devices = devices or [ProcessGroupGloo.create_default_device()]

    class Sharing(ProcessGroupGloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            options = _gloo._Options()
            options._devices, options._timeout = devices, timeout
            super().__init__(store, rank, size, options)

    _c10d.ProcessGroupGloo = Sharing
    try:
        yield
    finally:
        _c10d.ProcessGroupGloo = ProcessGroupGloo
