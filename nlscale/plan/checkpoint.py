"""A checkpoint's bytes: on disk, in memory, over the network, and read to go on from it.

What every node holds alike is dealt by bytes over the nodes of a data-parallel group
(`nlscale.checkpoint.state`), so that the ranks of a pipeline rank write files of one size, and read
what they have written once; norms and biases, which each tensor-parallel rank holds whole, are
written by the first and read by all. Not counted: what files hold beside numbers (names and places
of boxes, below a thousandth), and the verification, which reads all once more, spread over all
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.cluster.machines import Cluster
from nlscale.config.vocabulary import Config, Pending, Reduction, Sharding
from nlscale.levels.spectrum import INTEGER_BITS, Level, reduction_bytes
from nlscale.model.stages import stage_blocks
from nlscale.plan.memory import (
    COPY_BYTES,
    OUTER_BYTES,
    copied_by_stage,
    held_by_stage,
    kept_by_stage,
)


@dataclass(frozen=True)
class CheckpointPlan:
    """Of one checkpoint, at most: where the windows of all slow levels are unfinished."""

    bytes: int
    """On disk: weights, what updates them, windows, and errors of rounding still to be sent."""
    inter_node_bytes: float
    """That a node sends, for one reduction of unfinished windows and of such errors."""
    host_bytes: float
    """Of a node's memory, the mean, for the copy that is written."""
    largest_file_bytes: float
    """Of the rank that writes most."""
    files: int
    """One a rank."""
    resume_bytes: float
    """That all ranks together read to go on from it."""

    @property
    def skew(self) -> float:
        """The largest file over the mean."""
        return self.largest_file_bytes * self.files / self.bytes

    @property
    def reread(self) -> float:
        """Bytes read on resuming over those of the checkpoint."""
        return self.resume_bytes / self.bytes


def checkpoint_plan(
    config: Config, levels: list[Level], vocabulary: int, cluster: Cluster, group_nodes: int
) -> CheckpointPlan:
    """A checkpoint of a configuration on a cluster.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        cluster: the machines.
        group_nodes: nodes that a data-parallel group spans.
    """
    tensor, ranks = config.parallel.tensor, config.parallel.pipeline
    exact = config.checkpoint.pending == Pending.exact
    # with pending=exact each node stores windows of its own
    of_a_window = 4 * (group_nodes if exact else 1)
    owners = exact and config.parallel.shard_optimizer == Sharding.node
    of_an_error = of_a_window + 4 * owners
    defers = config.levels.reduction == Reduction.deferred
    writers = cluster.ranks // ranks  # of a pipeline rank
    cut = stage_blocks(config, vocabulary)
    total = largest = read = settled = 0.0
    for rank in range(ranks):
        mine = cut[rank::ranks]
        once = COPY_BYTES * tensor * copied_by_stage(config, vocabulary, mine)
        twice = 0.0
        held = held_by_stage(config, vocabulary, mine)
        kept = kept_by_stage(config, vocabulary, mine)
        for level, (split, whole), (split_kept, whole_kept) in zip(levels, held, kept, strict=True):
            waits = level.period > 1
            rounded = group_nodes > 1 and level.wire in INTEGER_BITS
            of_a_parameter = 4 + of_a_window * waits  # fp32 weights, and windows
            copies = 1  # of what the rule keeps
            if level.outer is not None:
                of_a_parameter += OUTER_BYTES
            if level.local:  # of each node weights, windows and what the rule keeps
                copies = group_nodes
                of_a_parameter = OUTER_BYTES + group_nodes * (4 + 4 * waits)
            of_a_parameter += of_an_error * rounded
            kept_whole = whole_kept * copies
            once += (split * tensor + whole) * of_a_parameter
            once += split_kept * copies * tensor + kept_whole
            twice += (tensor - 1) * (whole * of_a_parameter + kept_whole)
            summed = waits and defers and not level.local
            settled += (split * tensor + whole) * (summed + rounded)
        total += once
        read += once + twice
        # the first tensor rank writes what all of them hold whole
        largest = max(largest, (once + twice) / writers)
    crossing = reduction_bytes(settled, group_nodes) * group_nodes / cluster.nodes
    return CheckpointPlan(
        bytes=round(total),
        inter_node_bytes=0.0 if exact else crossing,
        host_bytes=total / cluster.nodes,
        largest_file_bytes=largest,
        files=cluster.ranks,
        resume_bytes=read,
    )
