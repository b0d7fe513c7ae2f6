"""Where the state of slow levels lies beside the device's memory, and what makes it lie there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlscale.config.vocabulary import Config, Tier, Updater
from nlscale.levels.host_tier import HostTier
from nlscale.levels.host_update import Staging, UpdatedOnHost
from nlscale.levels.kept import rules_by_level
from nlscale.levels.nvme import Drive, NvmeTier
from nlscale.levels.ring import Ring
from nlscale.levels.ring_pieces import ring_bytes
from nlscale.levels.spectrum import SyncGroup
from nlscale.optim.table import OnHost

MakesTier = Callable[
    [SyncGroup, Any, tuple[str, ...], dict[Any, Tensor], dict[Any, bool]], HostTier
]
"""Called with the last arguments of `HostTier`."""


def rings_of_levels(
    config: Config, groups: Iterable[SyncGroup], device: torch.device
) -> list[MakesTier | None]:
    """Of each level what moves the state of its groups away from the device, if it lies elsewhere.

    Those of a rank that are streamed through the device share one ring, and one drive.

    Args:
        config: of the run.
        groups: of which this rank holds a part.
        device: of the model.
    """
    here = {group.level for group in groups}
    found: list[MakesTier | None] = [None] * len(config.levels.spectrum)
    ring: Ring | None = None
    drive: Drive | None = None
    staging: dict[OnHost, Staging] = {}
    for level, entry in enumerate(config.levels.spectrum):
        if entry.memory == Tier.hbm or level not in here:
            continue
        if entry.update == Updater.cpu:
            own = rules_by_level(config)[level].on_host
            assert own is not None
            staging[own] = staging.get(own) or Staging(device, own)
            found[level] = partial(UpdatedOnHost, staging[own])
            continue
        ring = ring or Ring(ring_bytes(config), device)
        if entry.memory == Tier.host:
            found[level] = partial(HostTier, ring)
            continue
        assert config.tiers.folder is not None
        drive = drive or Drive(Path(config.tiers.folder), config.tiers.threads, ring)
        found[level] = partial(NvmeTier, ring, drive=drive)
    return found


def read_ahead(groups: Iterable[Any], step: int) -> None:
    """Let what lies on drives be read that is due next.

    Args:
        groups: `nlscale.levels.optimizers.GroupOptimizer` of this rank.
        step: that is about to be taken, counted from 1.
    """
    for g in groups:
        if g.optimizer.tier is not None:
            g.optimizer.tier.read_ahead(step)
