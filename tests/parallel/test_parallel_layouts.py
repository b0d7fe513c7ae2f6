"""Tensor, sequence and pipeline parallelism compute what one process computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import world
from levels.level_runs import largest_difference, run_engine

# Sums in another order, through four Adam steps.
TOLERANCE = 1e-5

BASE = [
    "train.global_batch=4",  # with one data-parallel rank that is four micro batches
    "model.layers=4",
    "data.sequence_length=16",
    "levels=[1,2,4]",
    "train.steps=4",  # every group of every level makes an update, most of them two
    # Larger gradients than at the usual start, so that less of each is rounding; and an eps to
    # match: a first update, g / (|g| + eps), makes a whole step of mere rounding that is above it.
    "model.init_std=0.1",
    "optimizer.eps=1e-3",
]
# tensor ranks, and whether the sequence is split between them
SPLITS = [(1, False), (2, False), (2, True), (4, False), (4, True)]
# pipeline ranks, and stages on each
PIPELINES = [(1, 1), (2, 1), (2, 2)]
KINDS = [
    (mixer, form)
    for mixer, form in itertools.product(
        ["hope", "gated-delta", "attention"], ["sequential", "independent"]
    )
]


def layout(tensor: int, sequence: bool, pipeline: int, virtual: int) -> list[str]:
    return [
        f"parallel.tensor={tensor}",
        f"parallel.sequence={'true' if sequence else 'false'}",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_stages={virtual}",
    ]


@pytest.fixture(scope="module")
def one_process() -> dict[tuple[str, str], dict]:
    """What one process computes, by mixer and CMS form."""
    return {kind: world.run(1, run_engine, [*BASE, *kind_keys(kind)])[0] for kind in KINDS}


def kind_keys(kind: tuple[str, str]) -> list[str]:
    return [f"model.mixer={kind[0]}", f"model.cms={kind[1]}"]


def cases() -> list[Any]:
    """Every layout, each with one kind of model, so that all kinds meet all sorts of layout."""
    layouts = list(itertools.product(SPLITS, PIPELINES, [1, 2]))[1:]
    out = []
    for i, (split, pipeline, data) in enumerate(layouts):
        kind = KINDS[(i + i // len(KINDS)) % len(KINDS)]
        stages = f"pp{pipeline[0]}" + "-interleaved" * (pipeline[1] > 1)
        name = f"tp{split[0]}{'-sp' * split[1]}-{stages}-dp{data}-{'-'.join(kind)}"
        out.append(pytest.param(split, pipeline, data, kind, id=name))
    return out


@pytest.mark.parametrize(("split", "pipeline", "data", "kind"), cases())
def test_a_layout_trains_as_one_process_does(
    one_process: dict, split: tuple, pipeline: tuple, data: int, kind: tuple[str, str]
) -> None:
    ranks = split[0] * pipeline[0] * data
    overrides = [*BASE, *kind_keys(kind), *layout(*split, *pipeline)]
    results = world.run(ranks, run_engine, overrides, ranks_per_node=ranks)
    compare(results, one_process[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once_over_two_nodes(one_process: dict, kind: tuple[str, str]) -> None:
    overrides = [*BASE, *kind_keys(kind), *layout(2, True, 2, 1), "parallel.ranks_per_node=2"]
    results = world.run(8, run_engine, overrides, ranks_per_node=2)
    compare(results, one_process[kind])


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_documents_stay_apart_in_every_layout(mixer: str) -> None:
    overrides = [*BASE, f"model.mixer={mixer}", "data.document_mask=true"]
    (expected,) = world.run(1, run_engine, overrides)
    (seen,) = world.run(1, run_engine, [*overrides, "data.document_mask=false"])
    assert expected["losses"] != pytest.approx(seen["losses"], rel=1e-3)
    compare(world.run(4, run_engine, [*overrides, *layout(2, True, 2, 2)]), expected)


def compare(results: list[dict], expected: dict) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["counts"] == expected["counts"]
    difference = largest_difference(results[0]["parameters"], expected["parameters"])
    assert difference <= TOLERANCE
