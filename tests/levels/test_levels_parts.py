"""Any part of the model at any level: the same training as a plain single process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import world
from checkpoint.resume_runs import train
from levels.level_runs import (
    VOCABULARY,
    largest_difference,
    load,
    run_engine,
    run_oracle,
    sequences,
    whole_parameters,
)
from levels.plain_rules import run_plain
from levels.test_levels_rules import BASE

from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.plan.traffic import traffic
from nlscale.step.trainer import Trainer

TOLERANCE = 1e-6  # as of test_levels_engine
PADDING = 0.05  # likewise
SLOW = [
    "model.mixer=attention",
    "model.layers=2",
    "data.sequence_length=16",
    "train.steps=6",
    "train.global_batch=4",
    "optimizer.eps=1e-3",
    "parallel.bucket_size=300",
]
MIXER_AND_EMBEDDING = (
    "levels=[{name: fast, period: 1}, {name: slow, period: 4, parts: [cms, mixer, embedding]}]"
)
CASES: dict[str, tuple[int, int, list[str]]] = {
    "tensor parallel, two nodes": (
        4,
        2,
        [MIXER_AND_EMBEDDING, "parallel.tensor=2", "parallel.sequence=true"],
    ),
    "pipeline over two nodes": (4, 1, [MIXER_AND_EMBEDDING, "parallel.pipeline=2"]),
    "a first level without an MLP, and norms apart": (
        2,
        1,
        [
            "levels=[{name: norms, period: 1, parts: [norms]}, {name: ends, period: 2, "
            "parts: [embedding, head]}, {name: slow, period: 4, parts: [cms, mixer]}]",
            "model.cms=independent",
        ],
    ),
    "a first level of period 2, one matrix for embedding and head": (
        2,
        1,
        [
            "levels=[{name: fast, period: 2, parts: [cms, mixer]}, {name: slow, period: 4, "
            "parts: [cms, embedding]}]",
            "model.tie_embeddings=true",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_train_as_a_plain_single_process_does(case: str) -> None:
    """With a dropped step at which windows close, and as many bytes as are planned."""
    ranks, per_node, overrides = CASES[case]
    overrides = [*SLOW, *overrides]
    results = world.run(ranks, run_engine, overrides, {4: ranks - 1}, ranks_per_node=per_node)
    alone = [o for o in overrides if not o.startswith("parallel.")]
    (oracle,) = world.run(1, run_oracle, alone, frozenset({4}))
    assert [i + 1 for i, ok in enumerate(results[0]["admitted"]) if not ok] == [4]
    for result in results:
        assert largest_difference(result["parameters"], oracle["parameters"]) <= TOLERANCE

    config = load(overrides)
    levels, nodes = spectrum(config.levels, 1), ranks // per_node
    group_nodes = nodes // config.parallel.pipeline if per_node == 1 else nodes
    planned = traffic(config, levels, VOCABULARY, nodes, group_nodes=group_nodes).per_step
    counted = results[0]["bytes_by_step"]
    for step in (1, 2, 3, 5):  # 4 crosses again, where it closes a window, and 6 is the last
        assert counted[step - 1] == pytest.approx(planned[(step - 1) % len(planned)]), step
    assert results[0]["sent"] == pytest.approx(sum(counted), rel=PADDING)


def test_a_level_has_its_rule_for_the_matrices_of_its_parts() -> None:
    slow = "{name: slow, period: 3, parts: [cms, mixer, embedding], optimizer: {rule: muon}}"
    overrides = [*BASE, "model.mixer=attention", f"levels=[{{name: fast, period: 1}}, {slow}]"]
    spread = [*overrides, "parallel.shard_optimizer=matrices"]
    results = world.run(2, run_engine, spread, {3: 1}, ranks_per_node=1)
    (plain,) = world.run(1, run_plain, overrides, frozenset({3}))
    assert largest_difference(results[0]["parameters"], plain["parameters"]) <= 1e-5
    assert results[0]["sent"] == pytest.approx(sum(results[0]["bytes_by_step"]), rel=PADDING)


def movements(overrides: list[str]) -> list[dict[str, bool]]:
    """On a rank of a world: whether each parameter has moved, step by step."""
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 1), VOCABULARY)
        moved, before = [], whole_parameters(trainer)
        for step in range(1, config.train.steps + 1):
            trainer.take_step(sequences(config, step))
            now = whole_parameters(trainer)
            moved.append({name: not torch.equal(now[name], before[name]) for name in now})
            before = now
        return moved


def test_a_part_moves_with_its_level_and_not_between() -> None:
    levels = (
        "levels=[{name: fast, period: 1, parts: [cms, head]}, "
        "{name: mid, period: 2, parts: [mixer]}, "
        "{name: slow, period: 3, parts: [cms, embedding, norms]}]"
    )
    overrides = ["model.layers=2", "levels.stagger=false", "train.steps=6", levels]
    (moved,) = world.run(1, movements, overrides)

    def period(name: str) -> int:
        if ".mixer." in name:
            return 2  # the norm of what is read inside a mixer is the mixer's
        return 3 if name.startswith("embedding") or "norm" in name or "mlps.1." in name else 1

    for step, names in enumerate(moved, 1):
        for name, moves in names.items():
            assert moves == (step % period(name) == 0), (step, name)


def test_a_run_goes_on_from_the_middle_of_the_windows_of_its_parts(tmp_path: Path) -> None:
    overrides = ["model.mixer=attention", "train.steps=7", MIXER_AND_EMBEDDING]
    whole = world.run(2, train, overrides, tmp_path, (5,), ranks_per_node=1)
    for aside, ranks in (("two nodes", 2), ("one rank", 1)):
        (last,) = tmp_path.glob("step-*7")
        last.rename(tmp_path / aside)
        again = world.run(ranks, train, overrides, tmp_path, (), True, ranks_per_node=1)
        difference = largest_difference(again[0]["parameters"], whole[0]["parameters"])
        assert difference == 0 if ranks == 2 else difference <= TOLERANCE

    # whatever is allowed: windows and counts of updates are those of the level it was at
    moved = "{name: slow, period: 4, parts: [cms, mixer, head]}"
    others = [*overrides[:-1], f"levels=[{{name: fast, period: 1}}, {moved}]"]
    with pytest.raises(AssertionError, match=r"levels\.spectrum\.1\.parts"):
        world.run(2, train, others, tmp_path, (), True, ranks_per_node=1)
    others.append("resume.allow=[levels.spectrum.1.parts]")
    with pytest.raises(AssertionError, match="parts of the model are at other levels"):
        world.run(2, train, others, tmp_path, (), True, ranks_per_node=1)
