"""Which tokens a step reads, and where documents begin in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from train.test_train_run import SMALL, small_data

from nlscale import recipe
from nlscale.batches import read_step
from nlscale.checks import prepare
from nlscale.parallel.layout import process_groups
from nlscale.parallel.schedule import Batch
from nlscale.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=20, held_out=0.3)


def first_step(data: Path, *overrides: str) -> tuple[list[Batch], int]:
    """The micro batches of the first step of a run, and the separator of its data."""
    config = recipe.load(
        None, [*SMALL, f"data.dir={data}", "data.sequence_length=3000", *overrides]
    ).config
    prepared = prepare(config)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, prepared.levels, prepared.vocabulary)
        return read_step(trainer, prepared), prepared.reader.samples.shards.separator


def test_documents_begin_with_their_separator_and_with_the_sample(data: Path) -> None:
    batches, separator = first_step(data, "data.document_mask=true")
    found = 0
    for batch in batches:
        assert batch.documents is not None
        begins = batch.documents.position == 0
        expected = batch.tokens == separator
        expected[:, 0] = True
        assert begins.equal(expected)
        found += int(begins.sum()) - len(begins)
    assert found > 3, "the data should hold several documents a sample"


def test_without_the_mask_there_are_none(data: Path) -> None:
    batches, _ = first_step(data)
    assert all(batch.documents is None for batch in batches)
