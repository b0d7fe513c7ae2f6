"""How the ranks of a run are spread over nodes, for plan and training alike (without torch)."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping
from typing import TypeVar

from nlscale.errors import UserError

K = TypeVar("K", bound=Hashable)
COMPARED_AT_ONCE = 2**27
"""Bytes that a comparison of the replicas takes in passing, however large a tensor is."""


def nodes_of_a_data_group(ranks: int, per_node: int, tensor: int, pipeline: int) -> int:
    """Nodes that a data-parallel group spans, the same number of its ranks on each.

    megatron-core numbers tensor, data, pipeline: the ranks of a pipeline rank follow each other,
    and those of a tensor-parallel group within them.

    Args:
        ranks: of the run.
        per_node: of each node.
        tensor: `parallel.tensor`.
        pipeline: `parallel.pipeline`; with `tensor` it divides the ranks.

    Raises:
        UserError: nodes that are not full, a tensor-parallel group that does not fit a node, or
            data-parallel groups that do not spread evenly.
    """
    if ranks % per_node:
        raise UserError(
            f"{ranks} ranks do not fill nodes of {per_node}; set parallel.ranks_per_node"
        )
    check_tensor(per_node, tensor)
    of_a_pipeline_rank = ranks // pipeline
    if of_a_pipeline_rank % per_node and per_node % of_a_pipeline_rank:
        raise UserError(
            f"parallel.pipeline {pipeline} gives each pipeline rank {of_a_pipeline_rank} GPUs "
            f"({of_a_pipeline_rank // tensor} data-parallel x {tensor} tensor-parallel), which "
            f"do not spread evenly over nodes of {per_node}; use a pipeline for which they fill "
            f"whole nodes, or several fill one"
        )
    return max(1, of_a_pipeline_rank // per_node)


def check_tensor(per_node: int, tensor: int) -> None:
    """Refuse a tensor-parallel group that spans nodes.

    Args:
        per_node: ranks of a node.
        tensor: `parallel.tensor`.

    Raises:
        UserError: the ranks of a node are not whole groups.
    """
    if per_node % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the {per_node} GPUs of a node: layers would "
            f"cross the network; use a divisor of {per_node}"
        )


def deal(sizes: Mapping[K, int], parts: int) -> list[list[K]]:
    """Deal things of different sizes so that the parts are as large as each other, nearly.

    The largest first, each to the first of the parts that are smallest so far; the same for whoever
    asks with the things in the same order.

    Args:
        sizes: by name.
        parts: how many there are, 1 or more.

    Returns:
        The names of each part; some parts are empty where there are more of them than things.
    """
    dealt: list[list[K]] = [[] for _ in range(parts)]
    least = [(0, part) for part in range(parts)]
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        size, part = least[0]
        dealt[part].append(name)
        heapq.heapreplace(least, (size + sizes[name], part))
    return dealt
