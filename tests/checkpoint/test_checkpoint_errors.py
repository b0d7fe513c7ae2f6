"""What rounding has left to be sent is state: it is saved, put back, and dealt to other nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, load_and_save, train
from checkpoint.test_checkpoint_resume import saved_only_at
from torch import Tensor

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint

STEPS, HALF = 5, 4
"""In the middle of a window of the slow level."""
KEYS = [
    "model.layers=1", "data.sequence_length=16", f"train.steps={STEPS}", "train.global_batch=6",
]  # fmt: skip
ROUNDED = "levels=[{period: 1, wire: int8}, {period: 3, wire: int4}]"
EXACT = "levels=[1,3]"


def run(nodes: int, keys: list[str], *args: Any) -> dict[str, Any]:
    return world.run(nodes, train, [*KEYS, *keys], *args, ranks_per_node=1)[0]  # type: ignore[no-any-return]


def errors(of: Checkpoint) -> dict[str, Tensor]:
    """By parameter: what all nodes and owners have still to send."""
    found: dict[str, Tensor] = {}
    for name, info in of.tensors().items():
        kind, _, parameter = name.partition("@")[0].partition("/")
        if kind in ("error", "owner_error"):
            values = torch.empty(info.shape)
            of.read([Piece(name, info.shape, (0,) * len(info.shape), values)])
            found[parameter] = found.get(parameter, torch.zeros(info.shape)) + values
    return found


EACH = "checkpoint.pending=exact"


@pytest.mark.parametrize("pending", ["checkpoint.pending=canonical", EACH])
def test_resuming_is_bitwise(tmp_path: Path, pending: str) -> None:
    keys, whole = [ROUNDED, pending], tmp_path / "whole"
    never_stopped = run(2, keys, whole, (HALF,), False, (3,))
    rest = saved_only_at(whole, HALF, tmp_path / "rest")
    owed = errors(checkpoint(rest, HALF))
    assert len(owed) == len(never_stopped["parameters"])
    assert all(values.any() for values in owed.values())
    if pending == EACH:
        with pytest.raises(
            AssertionError, match=r"errors of rounding as parallel\.shard_optimizer"
        ):
            run(2, [*keys, "parallel.shard_optimizer=all"], rest, (), True)
    resumed = run(2, keys, rest, (), True)
    assert resumed["losses"] == {s: never_stopped["losses"][s] for s in resumed["losses"]}
    result = compare(checkpoint(rest, STEPS), checkpoint(whole, STEPS))
    assert result["bitwise"], result


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By two nodes."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run(2, [ROUNDED], folder, (HALF,))
    return folder


def test_other_nodes_have_the_same_to_send_together(tmp_path: Path, saved: Path) -> None:
    before = errors(checkpoint(saved, HALF))
    folder, keys = saved_only_at(saved, HALF, tmp_path / "again"), [*KEYS, ROUNDED]
    for nodes, more in [
        (1, []),
        (2, ["parallel.shard_optimizer=all"]),
        (3, []),
        (4, ["parallel.tensor=2"]),  # ranks: two nodes
    ]:
        keys_here = [*keys, *more]
        world.run(nodes, load_and_save, keys_here, folder, ranks_per_node=1 + (nodes == 4))
        after = errors(checkpoint(folder, HALF))
        assert after.keys() == before.keys()
        for name, values in before.items():
            gap = (after[name] - values).norm() / values.norm()
            assert gap == 0 if nodes in (1, 2) else gap <= 1e-6, (nodes, name)


def test_one_node_sends_what_others_have_left(tmp_path: Path, saved: Path) -> None:
    folder = saved_only_at(saved, HALF, tmp_path / "alone")
    run(1, [ROUNDED], folder, (), True)
    assert not errors(checkpoint(folder, STEPS)), "an update has them: there are none to be saved"


def test_levels_may_cross_otherwise_when_that_is_allowed(tmp_path: Path, saved: Path) -> None:
    allowed = "resume.allow=[levels.spectrum.0.wire,levels.spectrum.1.wire]"
    exact = saved_only_at(saved, HALF, tmp_path / "exact")
    run(2, [EXACT, allowed], exact, (), True)
    assert not errors(checkpoint(exact, STEPS)), "sent as they were"
    run(2, [EXACT], tmp_path / "whole", (HALF,))
    plain = saved_only_at(tmp_path / "whole", HALF, tmp_path / "plain")
    assert not errors(checkpoint(plain, HALF))
    run(2, [ROUNDED, allowed], plain, (), True)
    assert all(values.any() for values in errors(checkpoint(plain, STEPS)).values())
