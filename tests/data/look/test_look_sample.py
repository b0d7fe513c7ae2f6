"""Samples to look at: those of a run, cut where documents end and where tokens begin to count."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data.corpora import small

from nlscale.data import BatchReader, Samples, TokenShards
from nlscale.data.look.sample import samples_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    with open(folder / "in.jsonl", "w") as out:
        for i in range(40):
            out.write(json.dumps({"prompt": f"{i}? ", "completion": f"{i + 1}."}) + "\n")
    small([str(folder / "in.jsonl")], folder / "out")
    return folder / "out"


def test_they_are_those_of_a_run(data: Path) -> None:
    shards = TokenShards(data, "train")
    reader = BatchReader(Samples(shards, 16), seed=5)
    found = list(samples_of(shards, 16, seed=5, count=4))
    assert np.array_equal([sample.ids for sample in found], reader.read(0, 4))
    assert np.array_equal([sample.counts for sample in found], reader.masks(0, 4))
    assert [sample.number for sample in found] == [0, 1, 2, 3]
    everything = list(samples_of(shards, 16, seed=5, count=10**6))
    assert sorted(sample.sample for sample in everything) == list(range(len(everything)))


def test_those_of_validation_are_as_they_lie(data: Path) -> None:
    shards = TokenShards(data, "validation")
    for i, sample in enumerate(samples_of(shards, 8, seed=5, count=3)):
        assert sample.sample == i
        assert np.array_equal(sample.ids, shards.read(i * 8, 9))


def test_pieces_are_the_sample_and_of_one_kind_each(data: Path) -> None:
    shards = TokenShards(data, "train")
    (sample,) = samples_of(shards, 40, seed=1, count=1)
    pieces = sample.pieces(shards.separator)
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), sample.ids)
    for before, piece in pairwise(pieces):
        assert (before.border, before.counts) != (piece.border, piece.counts)
    for piece in pieces:
        there = slice(piece.start, piece.start + len(piece.ids))
        assert ((sample.ids[there] == shards.separator) == piece.border).all()
        assert (sample.counts[there] == piece.counts).all()
    assert {(p.border, p.counts) for p in pieces} == {(True, True), (False, True), (False, False)}
