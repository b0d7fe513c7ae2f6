"""Outer steps, and what each node has of a local level, in checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import world
from checkpoint.resume_runs import checkpoint, load_and_save, train
from checkpoint.test_checkpoint_resume import saved_only_at
from torch import Tensor

from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint

STEPS, SAVED = 9, 5
"""Saved within a window, and an outer period, of most of the blocks of both levels."""
PHASES = [(0, 0), (1, 1), (0, 1)]
"""Of the local level in each block: of four steps, from outer step to outer step, they end at 0, 1
and 2; the period is two of them."""
BASE = [
    "levels=[{period: 1, outer: {every: 3}}, {period: 2, local: true, outer: {every: 2}}]",
    f"train.steps={STEPS}",
    "model.layers=3",
    "train.global_batch=4",
]
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "one node": (2, 2, []),
    "two nodes": (4, 2, []),
    "two nodes, tp2": (4, 2, ["parallel.tensor=2"]),
    "four nodes": (4, 1, []),
}


def run(layout: str, *args: object, more: list[str] | None = None) -> list[dict]:
    ranks, per_node, spread = LAYOUTS[layout]
    return world.run(ranks, train, [*BASE, *spread, *(more or [])], *args, ranks_per_node=per_node)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run on two nodes that never stopped, with a step that was dropped."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    run("two nodes", folder, (SAVED,), False, (4,))
    return folder


def read(found: Checkpoint, name: str) -> Tensor:
    shape = found.tensors()[name].shape
    tensor = torch.empty(shape)
    found.read([Piece(name, shape, (0,) * len(shape), tensor)])
    return tensor


def test_resuming_on_the_same_nodes_is_bitwise(tmp_path: Path, two_nodes: Path) -> None:
    rest = saved_only_at(two_nodes, SAVED, tmp_path / "rest")
    kinds = {name.partition("/")[0] for name in checkpoint(rest, SAVED).tensors()}
    assert kinds >= {"outer_weights", "outer_momentum", "local_weights", "window"}
    run("two nodes", rest, (), True)
    result = compare(checkpoint(rest, STEPS), checkpoint(two_nodes, STEPS))
    assert result["bitwise"], result
    # The last outer step makes one model of all, of which no node has weights of its own.
    kinds = {name.partition("/")[0] for name in checkpoint(rest, STEPS).tensors()}
    assert "local_weights" not in kinds and "outer_weights" not in kinds


def test_other_ranks_of_as_many_nodes_load_the_very_same_state(
    tmp_path: Path, two_nodes: Path
) -> None:
    again = saved_only_at(two_nodes, SAVED, tmp_path / "again")
    ranks, per_node, spread = LAYOUTS["two nodes, tp2"]
    world.run(ranks, load_and_save, [*BASE, *spread], again, ranks_per_node=per_node)
    result = compare(checkpoint(again, SAVED), checkpoint(two_nodes, SAVED))
    assert result["bitwise"], result


@pytest.mark.parametrize("layout", ["one node", "four nodes"])
def test_another_number_of_nodes_goes_on_from_the_mean(
    tmp_path: Path, two_nodes: Path, layout: str
) -> None:
    again = saved_only_at(two_nodes, SAVED, tmp_path / "again")
    ranks, per_node, spread = LAYOUTS[layout]
    world.run(ranks, load_and_save, [*BASE, *spread], again, ranks_per_node=per_node)
    before, after = checkpoint(two_nodes, SAVED), checkpoint(again, SAVED)
    nodes = after.state["layout"]["nodes"]
    seen = set()
    for entry, then in zip(after.state["levels"], before.state["levels"], strict=True):
        for key in ("tokens", "counted_tokens", "updates", "outer_updates", "outer_steps"):
            assert entry[key] == then[key]
        if entry["level"] == 1:
            assert sum(entry["outer_counted"]) == sum(then["outer_counted"])
            assert max(entry["outer_counted"]) - min(entry["outer_counted"]) <= 1
            assert entry["node_counted"] == [then["counted_tokens"]] + [0] * (nodes - 1)
    counted = {
        (group["phase"], group["outer_phase"]): group["outer_counted"]
        for group in before.state["levels"]
        if group["level"] == 1
    }
    assert len({tuple(of_nodes) for of_nodes in counted.values()}) > 1
    for name in before.tensors():
        kind, _, rest = name.partition("/")
        if "@" not in name:
            assert torch.equal(read(after, name), read(before, name)), name
            continue
        base, _, node = rest.partition("@")
        if node != "0":
            continue
        theirs = [read(before, f"{kind}/{base}@{k}") for k in range(2)]
        assert not torch.equal(*theirs), "nodes that are alike prove nothing"
        seen.add(kind)
        for k in range(nodes):
            mine = read(after, f"{kind}/{base}@{k}")
            expected = sum(theirs) * (k == 0)
            if kind != "window":
                of_nodes = counted[PHASES[int(base.split(".")[1])]]
                parts = of_nodes if sum(of_nodes) else [1, 1]
                expected = sum(n * t for n, t in zip(parts, theirs, strict=True)) / sum(parts)
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
    assert seen == {"local_weights", "exp_avg", "exp_avg_sq", "window"}
    resumed = run(layout, again, (), True)[0]
    assert list(resumed["losses"]) == list(range(SAVED + 1, STEPS + 1))


def test_a_level_does_not_become_local_at_a_checkpoint(tmp_path: Path, two_nodes: Path) -> None:
    rest = saved_only_at(two_nodes, SAVED, tmp_path / "rest")
    more = ["levels.spectrum.1.local=false", "resume.allow=[levels.spectrum.1.local]"]
    with pytest.raises(AssertionError, match=r"levels.spectrum.1.local is false, and the check"):
        run("two nodes", rest, (), True, more=more)


def test_outer_steps_begin_at_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    without = ["levels=[1,2]"]
    run("one node", tmp_path / "run", (SAVED,), False, more=without)
    rest = saved_only_at(tmp_path / "run", SAVED, tmp_path / "rest")
    keys = ["levels.spectrum.0.outer.every=2", "resume.allow=[levels.spectrum.0.outer.every]"]
    run("one node", rest, (7,), True, more=[*without, *keys])
    found = checkpoint(rest, 7)
    assert {group["outer_steps"] for group in found.state["levels"]} == {0, 1}
    assert "outer_momentum/head.weight" in found.tensors()
