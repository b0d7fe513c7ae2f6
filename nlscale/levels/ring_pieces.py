"""Which levels have their state in host memory, and in what pieces it is streamed (no tensors)."""

from __future__ import annotations

from nlscale.config.vocabulary import RULES, Config, Tier, Updater
from nlscale.errors import UserError
from nlscale.levels.kept import rules_by_level
from nlscale.optim.table import Rule, rule

RING_SLOTS = 3
"""Of the ring: one piece comes in, one is updated, one goes out."""
ALIGNED = 1024
"""Elements at whose multiples a shard is cut. torch's fused rules on a CPU take the last few of a
tensor, which fill no vector register, by other instructions; at other ends they would be others."""


def ring_bytes(config: Config) -> int:
    """Of the ring of a rank that streams anything."""
    return int(config.tiers.ring_mib * 2**20)


def piece_elements(size: int, kept: int) -> int:
    """The largest piece of a shard that a slot holds, with all that its rule keeps of it.

    Args:
        size: of the ring, bytes.
        kept: tensors that the rule keeps of a shard, beside its weights.
    """
    return size // RING_SLOTS // 4 // (1 + kept) // ALIGNED * ALIGNED


def on_host(config: Config) -> list[bool]:
    """Of each level, fastest first, whether its state lies in host memory."""
    return [entry.memory == Tier.host for entry in config.levels.spectrum]


def on_nvme(config: Config) -> list[bool]:
    """Likewise, on a drive."""
    return [entry.memory == Tier.nvme for entry in config.levels.spectrum]


def off_device(config: Config) -> list[bool]:
    """Likewise, in either: an update brings it, or gradients and weights, past the ring."""
    return [entry.memory != Tier.hbm for entry in config.levels.spectrum]


def streamed(config: Config) -> list[bool]:
    """Likewise, and goes through the ring."""
    entries = zip(config.levels.spectrum, off_device(config), strict=True)
    return [moved and entry.update == Updater.device for entry, moved in entries]


def check_tiers(config: Config) -> None:
    """Whether what is to be streamed can be.

    Raises:
        UserError: a level has a rule that takes whole matrices, or outer steps; or the ring has no
            room for a piece.
    """
    levels = zip(config.levels.spectrum, off_device(config), rules_by_level(config), strict=True)
    if any(on_nvme(config)) and config.tiers.folder is None:
        raise UserError(
            f"levels.spectrum.{on_nvme(config).index(True)}.memory=nvme keeps a level's state on a "
            f"drive; set tiers.folder to a folder on a drive of each node"
        )
    for index, (entry, moved, own) in enumerate(levels):
        if entry.update == Updater.cpu and entry.memory != Tier.host:
            raise UserError(
                f"levels.spectrum.{index}.update=cpu updates state where it lies, in host memory, "
                f"and that of the level is in {entry.memory.value}; use "
                f"levels.spectrum.{index}.memory=host, or update=device"
            )
        if not moved:
            continue
        key = f"levels.spectrum.{index}.memory={entry.memory.value}"
        if own.whole_matrices:
            raise UserError(
                f"{key} streams a level's state piece by piece, and its rule takes whole matrices; "
                f"use levels.spectrum.{index}.optimizer={{rule: adamw}}, or memory=hbm"
            )
        if entry.outer.every is not None:
            raise UserError(
                f"{key}: the weights and the momentum of outer steps are kept on the GPU, and the "
                f"level makes them every {entry.outer.every} updates; use memory=hbm, or "
                f"levels.spectrum.{index}.outer.every=null"
            )
        if entry.update == Updater.cpu:
            _check_host_update(index, own)
            continue
        if not piece_elements(ring_bytes(config), len(own.state)):
            least = RING_SLOTS * 4 * (1 + len(own.state)) * ALIGNED / 2**20
            raise UserError(
                f"tiers.ring_mib {config.tiers.ring_mib:g} has no room for {ALIGNED} parameters "
                f"of {key} in each of {RING_SLOTS} slots; use {least:g} or more"
            )


def _check_host_update(index: int, own: Rule) -> None:
    if own.on_host is not None:
        return
    able = [name for name in RULES if rule(name).on_host is not None]
    raise UserError(
        f"levels.spectrum.{index}.update=cpu: the host updates under {' or '.join(able)} alone; "
        f"use levels.spectrum.{index}.optimizer={{rule: {able[0]}}}, or update=device"
    )


def operations(config: Config) -> list[str]:
    """Names of the compiled operations that a run takes, see `nlscale.ops.compiled`."""
    found = ["async_io"] if any(on_nvme(config)) else []
    for entry, own in zip(config.levels.spectrum, rules_by_level(config), strict=True):
        if entry.update == Updater.cpu and own.on_host is not None:
            found.append(own.on_host.operation)
    return list(dict.fromkeys(found))
