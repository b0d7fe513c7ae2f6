"""Tensor, sequence and pipeline parallelism compute what one process computes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import world
from levels.level_runs import largest_difference, run_engine

# Sums in another order, through four Adam steps.
TOLERANCE = 1e-5

BASE = [
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


def size(pipeline: int, virtual: int) -> tuple[str, ...]:
    """A layer a stage, or two; as many micro batches as keep a pipeline of them busy."""
    batch = 2 if pipeline == 1 else 4  # of one data-parallel rank or two
    return f"model.layers={max(2, pipeline * virtual)}", f"train.global_batch={batch}"


def layout(tensor: int, sequence: bool, pipeline: int, virtual: int) -> list[str]:
    return [
        f"parallel.tensor={tensor}",
        f"parallel.sequence={'true' if sequence else 'false'}",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_stages={virtual}",
    ]


@pytest.fixture(scope="module")
def one_process() -> Callable[..., dict]:
    """`one_process(kind, *keys)`: what one process computes, of a mixer and a CMS form; once."""

    @functools.cache
    def trained(kind: tuple[str, str], *keys: str) -> dict:
        return world.run(1, run_engine, [*BASE, *kind_keys(kind), *keys])[0]

    return trained


def kind_keys(kind: tuple[str, str]) -> list[str]:
    return [f"model.mixer={kind[0]}", f"model.cms={kind[1]}"]


def cases() -> list[Any]:
    """Every split with every pipeline, each also with one and with two data-parallel ranks, though
    not with each other; each layout with one kind of model, so that all kinds meet all sorts."""
    out = []
    for i, ((s, split), (p, pipeline)) in enumerate(
        itertools.product(enumerate(SPLITS), enumerate(PIPELINES))
    ):
        data = 2 - (s + p) % 2
        kind = KINDS[(i + i // len(KINDS)) % len(KINDS)]
        stages = f"pp{pipeline[0]}" + "-interleaved" * (pipeline[1] > 1)
        name = f"tp{split[0]}{'-sp' * split[1]}-{stages}-dp{data}-{'-'.join(kind)}"
        out.append(pytest.param(split, pipeline, data, kind, id=name))
    return out


@pytest.mark.parametrize(("split", "pipeline", "data", "kind"), cases())
def test_a_layout_trains_as_one_process_does(
    one_process: Callable[..., dict],
    split: tuple,
    pipeline: tuple,
    data: int,
    kind: tuple[str, str],
) -> None:
    ranks = split[0] * pipeline[0] * data
    keys = size(*pipeline)
    overrides = [*BASE, *kind_keys(kind), *keys, *layout(*split, *pipeline)]
    results = world.run(ranks, run_engine, overrides, ranks_per_node=ranks)
    compare(results, one_process(kind, *keys))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[4]])  # each mixer, each form
def test_everything_at_once_over_two_nodes(
    one_process: Callable[..., dict], kind: tuple[str, str]
) -> None:
    keys = size(2, 1)
    overrides = [*BASE, *kind_keys(kind), *keys, *layout(2, True, 2, 1)]
    results = world.run(8, run_engine, [*overrides, "parallel.ranks_per_node=2"], ranks_per_node=2)
    compare(results, one_process(kind, *keys))


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_documents_stay_apart_in_every_layout(mixer: str) -> None:
    overrides = [*BASE, *size(2, 2), f"model.mixer={mixer}", "data.document_mask=true"]
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
