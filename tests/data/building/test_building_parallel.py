"""What is built does not depend on how many processes build it, nor the documents on the units."""

from __future__ import annotations

import hashlib
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from data.building.builds import contents, corpus, units
from data.corpora import documents

from nlscale.data import TokenShards
from nlscale.data.building import pool
from nlscale.data.building.units import cut
from nlscale.data.documents import SourceFile
from nlscale.data.index import UNITS_NAME
from nlscale.errors import LostRank


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
def test_any_number_of_processes_builds_the_same_bytes(tmp_path: Path, masks: bool) -> None:
    sources = corpus(tmp_path / "in", masks)
    options: dict[str, Any] = {"tokenizer": "bpe:270", "duplicates": "drop"}
    for workers in (1, 2, 3):
        units(sources, tmp_path / f"{workers}", workers=workers, **options)
    one = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == one == contents(tmp_path / "3")
    assert len([name for name in one if name.endswith(".tar")]) > 10
    assert not (tmp_path / "1" / UNITS_NAME).exists()


def test_units_change_where_shards_end_and_nothing_else(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "in", masks=True)
    several = units(sources, tmp_path / "several")
    one = units(sources, tmp_path / "one", unit_bytes=1 << 30)
    for split in ("train", "validation"):
        here, there = (TokenShards(tmp_path / name, split) for name in ("several", "one"))
        assert np.array_equal(here.read(0, here.tokens), there.read(0, there.tokens))
        masks = [shards.read_mask(0, here.tokens) for shards in (here, there)]
        assert np.array_equal(*masks)
        assert not np.all(masks[0])
        figures = [
            {**index["splits"][split], "shards": None, "format": index["format"]}
            for index in (several, one)
        ]
        assert figures[0] == figures[1]
        assert len(here.shards) > len(there.shards)
    for figure in ("skipped", "lost_files", "left_out", "empty_documents", "unigram_bits_per_byte"):
        assert several[figure] == one[figure]  # type: ignore[literal-required]
    assert several["skipped"]["count"] == 9 and several["empty_documents"] == 9


def test_webdataset_reads_the_shards_of_all_units_by_keys_of_their_own(tmp_path: Path) -> None:
    index = units(corpus(tmp_path / "in"), tmp_path / "out")
    shards = index["splits"]["train"]["shards"]
    names = [shard["name"] for shard in shards]
    assert names == [f"train-{i:06d}.tar" for i in range(len(names))]
    urls = [str(tmp_path / "out" / name) for name in names]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    keys = [sample["__key__"] for sample in samples]
    assert keys == sorted(set(keys)) and keys[0].startswith("00000-")
    ids = np.concatenate([np.frombuffer(sample["tokens.bin"], np.uint8) for sample in samples])
    read = TokenShards(tmp_path / "out")
    assert np.array_equal(ids, read.read(0, read.tokens))
    # a block that is short ends a unit
    assert len({shard["tokens"] % 100 for shard in shards}) > 2


def files(sizes: list[int]) -> list[SourceFile]:
    return [SourceFile(Path(f"{i}"), f"{i}", size, 0) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "unit", "counts"),
    [
        ([10] * 6, 20, [2, 2, 2]),
        ([10] * 6, 60, [6]),
        ([10] * 6, 59, [3, 3]),
        ([0, 0, 0], 5, [3]),
        ([100, 1, 1, 1, 1], 26, [1, 4]),
        ([1, 1, 100, 1, 1], 52, [2, 3]),
        ([5], 1, [1]),
    ],
)
def test_files_are_cut_evenly(sizes: list[int], unit: int, counts: list[int]) -> None:
    assert cut(files(sizes), unit) == counts


def test_a_large_corpus_has_larger_units() -> None:
    assert len(cut(files([1 << 40] * 5000), 1 << 28)) == 4096


def dies(out: str, token: str, pipe: Connection, alive: Connection) -> None:
    """A worker that the kernel takes for the one to kill when memory is short."""
    pipe.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = corpus(tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(pool, "_serve", dies)
        with pytest.raises(LostRank) as caught:
            units(sources, tmp_path / "out", workers=2)
    said = str(caught.value)
    assert "was killed (SIGKILL) at the survey of unit" in said and ".jsonl" in said
    assert "--workers" in said and "\n" not in said and caught.value.exit_code == 5
    units(sources, tmp_path / "out")
    units(sources, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_ctrl_c_ends_the_workers_and_keeps_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    started: list[pool._Worker] = []
    give = pool._Worker.give

    def interrupted(worker: pool._Worker, kind: str, number: int) -> None:
        started.append(worker)
        if len(started) == 5:
            raise KeyboardInterrupt
        give(worker, kind, number)

    with monkeypatch.context() as patch:
        patch.setattr(pool._Worker, "give", interrupted)
        with pytest.raises(KeyboardInterrupt):
            units(sources, out, workers=2)
    assert not any(worker.process.is_alive() for worker in started)
    left = sorted(path.name for path in (out / UNITS_NAME).iterdir())
    assert [name for name in left if name.startswith("survey")] and not any(
        name.endswith(".partial") for name in left
    )
    units(sources, out, workers=2)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_documents_are_those_of_the_sources_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"number {i}" + " more" * (i % 7 * 9) for i in range(90)]
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    index = units([str(folder)], tmp_path / "out", unit_bytes=700)
    for split in ("train", "validation"):
        part = documents(tmp_path / "out", split)
        assert part == [text for text in texts if text in part]
        for shard in index["splits"][split]["shards"]:
            path = tmp_path / "out" / shard["name"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
    assert sum(len(documents(tmp_path / "out", s)) for s in ("train", "validation")) == 90
