"""Which tokens a step reads, and where documents begin in them."""

from __future__ import annotations

import queue
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from train.test_train_run import SMALL, small_data

from nlscale.config import recipe
from nlscale.data.reader import BatchReader
from nlscale.errors import UserError
from nlscale.parallel.layout import process_groups
from nlscale.step.micro_batches import Batch
from nlscale.step.trainer import Trainer
from nlscale.train.batches import StepReader
from nlscale.train.prepare import prepare


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
        return StepReader(trainer, prepared).take(), prepared.readers[0].samples.shards.separator


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


def test_the_next_step_is_read_while_one_is_taken(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe.load(
        None, [*SMALL, f"data.dir={data}", "data.sequence_length=100", "train.steps=4"]
    ).config
    asked: queue.Queue[int] = queue.Queue()
    lost_at = 3 * config.train.global_batch
    read = BatchReader.read

    def noted(self: BatchReader, first: int, count: int) -> NDArray[np.int64]:
        asked.put(first)
        if first >= lost_at:
            raise UserError("the shard is gone")
        return read(self, first, count)

    monkeypatch.setattr(BatchReader, "read", noted)
    prepared = prepare(config)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, prepared.levels, prepared.vocabulary)
        reader = StepReader(trainer, prepared)
        size, micro_batch = config.train.global_batch, config.train.micro_batch
        for step in range(3):
            batches = reader.take()
            if step == 0:
                seen = [asked.get(timeout=10) for _ in batches]
                assert seen == list(range(0, size, micro_batch))
            # with nobody asking for it
            begun = (step + 1) * size
            assert asked.get(timeout=10) == begun
            if begun < lost_at:
                rest = [asked.get(timeout=10) for _ in batches[1:]]
                assert rest == list(range(begun + micro_batch, begun + size, micro_batch))
            expected = read(prepared.readers[0], step * size, micro_batch)
            assert batches[0].tokens.numpy().tolist() == expected[:, :-1].tolist()
            trainer.counters.step += 1
            trainer.counters.samples += size
        # only the step that needs what is lost fails
        with pytest.raises(UserError, match="the shard is gone"):
            reader.take()


def test_nothing_is_read_beyond_the_last_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = BatchReader.read

    def noted(self: BatchReader, first: int, count: int) -> NDArray[np.int64]:
        asked.append(first)
        return read(self, first, count)

    monkeypatch.setattr(BatchReader, "read", noted)
    batches, _ = first_step(data, "train.steps=1")
    time.sleep(0.2)
    assert len(asked) == len(batches)


def test_without_the_mask_there_are_none(data: Path) -> None:
    batches, _ = first_step(data)
    assert all(batch.documents is None for batch in batches)
