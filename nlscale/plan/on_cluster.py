"""How a run lies on a cluster, and whether it can."""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.cluster.machines import Cluster
from nlscale.cluster.spread import check_tensor
from nlscale.config.vocabulary import Config
from nlscale.data.index import read_index
from nlscale.errors import UserError
from nlscale.plan.checks import check_sizes


@dataclass(frozen=True)
class OnCluster:
    """A run on a cluster."""

    cluster: Cluster
    vocabulary: int
    """Token ids of the model."""
    data_parallel: int
    """Ranks that share a batch."""
    group_nodes: int
    """Nodes that a data-parallel group spans."""

    @classmethod
    def of(cls, config: Config, cluster: Cluster) -> OnCluster:
        """Check that a run can be spread over a cluster, and say how.

        Raises:
            UserError: it cannot, or its vocabulary is unknown.
        """
        vocabulary, parallel = vocabulary_of(config), config.parallel
        data_parallel = check(config, cluster, vocabulary)
        group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
        return cls(cluster, vocabulary, data_parallel, group_nodes)


def vocabulary_of(config: Config) -> int:
    """Token ids of the model: `model.vocabulary`, else what the data were built with.

    Raises:
        UserError: neither is there.
    """
    if config.model.vocabulary is not None:
        return config.model.vocabulary
    try:
        return read_index(config.data.folders()[0])["vocabulary"]
    except UserError as error:
        raise UserError(f"{error}; or give model.vocabulary=N to plan without data") from None


def check(config: Config, cluster: Cluster, vocabulary: int) -> int:
    """Whether the configuration can be spread over the cluster.

    Returns:
        The data-parallel ranks, those that share a batch.

    Raises:
        UserError: the numbers that do not fit and what would.
    """
    tensor = config.parallel.tensor
    where = f"{cluster.name} ({cluster.nodes} x {cluster.gpus_per_node})"
    per_node = config.parallel.ranks_per_node
    if per_node not in (None, cluster.gpus_per_node):
        raise UserError(
            f"parallel.ranks_per_node is {per_node}, but {where} has {cluster.gpus_per_node} GPUs "
            f"a node; leave it null"
        )
    check_tensor(cluster.gpus_per_node, tensor)
    if vocabulary % tensor:
        raise UserError(
            f"model.vocabulary {vocabulary} is not divisible by parallel.tensor {tensor}; use "
            f"{-(-vocabulary // tensor) * tensor}"
        )
    return check_sizes(config, cluster.ranks)
