"""What each node has for itself, of local levels, on another number of nodes than wrote it.

Every node goes on from the mean of what the nodes had: of weights and of what the rule keeps alike,
weighted by the targets that each has counted since the last outer step, as that weights what they
have moved; evenly right after one. Sums of windows are added up, and the first node has the total.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nlscale.checkpoint.flat import boxes
from nlscale.checkpoint.state import Own
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.levels.spectrum import SyncGroup
from nlscale.parallel.layout import Layout


def group_of(entry: dict[str, Any]) -> SyncGroup:
    """The sync group that an entry of a checkpoint's levels is of."""
    return SyncGroup(entry["level"], entry["phase"], entry["period"], entry.get("outer_phase", 0))


def read_own(checkpoint: Checkpoint, held: list[Own], layout: Layout) -> None:
    """Fill in what each node has for itself, from that of all nodes that wrote the checkpoint.

    It takes as much memory once more.

    Args:
        checkpoint: of another number of nodes.
        held: what this rank holds; filled in place.
        layout: this rank's place.

    Raises:
        CheckpointError: the checkpoint does not hold it.
    """
    shares = {group_of(entry): _shares(entry) for entry in checkpoint.state["levels"]}
    for own in held:
        own.flat.data.zero_()
    for node in range(checkpoint.state["layout"]["nodes"]):
        theirs = [replace(own.of_node(node), data=torch.empty_like(own.flat.data)) for own in held]
        checkpoint.read([piece for flat in theirs for piece in boxes(flat, layout)])
        for own, flat in zip(held, theirs, strict=True):
            share = float(layout.node_rank == 0) if own.window else shares[own.group][node]
            own.flat.data.add_(flat.data, alpha=share)


def _shares(entry: dict[str, Any]) -> list[float]:
    """The weight of each node that wrote a checkpoint, in the means of a sync group; sum 1."""
    counted = entry.get("outer_counted", [])
    total = sum(counted)
    return [count / total if total else 1 / len(counted) for count in counted]
