"""Over how many nodes data-parallel groups spread: one count, for the plan and for training."""

from __future__ import annotations

import itertools

import pytest
import world

from nlscale.cluster.machines import Cluster
from nlscale.cluster.spread import nodes_of_a_data_group
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.parallel.layout import process_groups

SIZES = (1, 2, 3, 4, 6, 8)


def counted(ranks: int, per_node: int, tensor: int, pipeline: int) -> set[tuple[int, ...]]:
    """Ranks on each node of every data-parallel group, numbered as megatron-core does."""
    data = ranks // (tensor * pipeline)
    found = set()
    for stage, i in itertools.product(range(pipeline), range(tensor)):
        group = [((stage * data + j) * tensor + i) // per_node for j in range(data)]
        found.add(tuple(group.count(node) for node in sorted(set(group))))
    return found


def test_the_count_is_that_of_the_ranks_themselves() -> None:
    refused = accepted = 0
    for nodes, per_node, tensor, pipeline in itertools.product(SIZES, repeat=4):
        ranks = nodes * per_node
        if ranks % (tensor * pipeline):
            continue
        shares = counted(ranks, per_node, tensor, pipeline)
        try:
            found = nodes_of_a_data_group(ranks, per_node, tensor, pipeline)
        except UserError:
            refused += 1
            assert per_node % tensor or len({*next(iter(shares))}) > 1 or len(shares) > 1
            continue
        accepted += 1
        assert shares == {(ranks // (tensor * pipeline) // found,) * found}
    assert refused > 50 and accepted > 250


def test_nodes_that_are_not_full_are_refused() -> None:
    with pytest.raises(UserError, match=r"6 ranks do not fill nodes of 4; set parallel"):
        nodes_of_a_data_group(6, 4, 1, 1)


def started(*overrides: str) -> str:
    """What training says on a rank when its process groups are to be made."""
    config = recipe.load(None, ["data.dir=none", *overrides]).config
    try:
        with process_groups(config):
            return "started"
    except UserError as error:
        return str(error)


def test_training_refuses_what_the_plan_refuses() -> None:
    cluster = Cluster("pair", 2, 2, 1.0, 1.0)
    for tensor, pipeline in ((4, 1), (2, 1), (1, 4), (2, 2)):
        sizes = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
        said = world.run(4, started, *sizes, ranks_per_node=2)
        try:
            cluster.nodes_of_a_data_group(tensor, pipeline)
            planned = "started"
        except UserError as error:
            planned = str(error)
        assert set(said) == {planned}
        assert (planned == "started") == (tensor < 4)
