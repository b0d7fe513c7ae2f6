"""Where the state of slow levels lies beside the device's memory, and what makes it lie there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nlscale.config.vocabulary import Config, Updater
from nlscale.levels.host_tier import HostTier
from nlscale.levels.host_update import Staging, UpdatedOnHost
from nlscale.levels.kept import rules_by_level
from nlscale.levels.ring import Ring
from nlscale.levels.ring_pieces import on_host, ring_bytes
from nlscale.levels.spectrum import SyncGroup
from nlscale.optim.table import OnHost

MakesTier = Callable[
    [SyncGroup, Any, tuple[str, ...], dict[Any, Tensor], dict[Any, bool]], HostTier
]
"""Called with the last arguments of `HostTier`."""


def rings_of_levels(
    config: Config, groups: Iterable[SyncGroup], device: torch.device
) -> list[MakesTier | None]:
    """Of each level what moves the state of its groups to host memory, if it lies there.

    Those of a rank that are streamed through the device share one ring.

    Args:
        config: of the run.
        groups: of which this rank holds a part.
        device: of the model.
    """
    here = {group.level for group in groups}
    moved = [own and level in here for level, own in enumerate(on_host(config))]
    found: list[MakesTier | None] = [None] * len(moved)
    ring: Ring | None = None
    staging: dict[OnHost, Staging] = {}
    for level, entry in enumerate(config.levels.spectrum):
        if not moved[level]:
            continue
        if entry.update == Updater.cpu:
            own = rules_by_level(config)[level].on_host
            assert own is not None
            staging[own] = staging.get(own) or Staging(device, own)
            found[level] = partial(UpdatedOnHost, staging[own])
            continue
        ring = ring or Ring(ring_bytes(config), device)
        found[level] = partial(HostTier, ring)
    return found
