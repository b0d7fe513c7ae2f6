"""Timing tiny builds: what is compared is the same text, and ratios are of what is printed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data.corpora import small

from nlscale.bench import readers
from nlscale.bench.data import Reading, bench_data, print_data, text_of_data, text_of_sources
from nlscale.cli.command import main
from nlscale.data.index import read_index
from nlscale.errors import UserError

TEXT = [f"document {i}: " + "some words again and again " * (i % 9) for i in range(80)]
READING = Reading(sequence_length=32, micro_batch=2, seconds=0.01)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, document in enumerate(TEXT):
        (folder / f"{i:03d}.txt").write_text(document)
    (folder / "empty.txt").write_text("")
    (folder / "zz.txt").write_bytes(b"\xe9")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "scratch").mkdir()
    yield tmp_path / "scratch"


def test_ratios_are_of_what_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    found = bench_data(TEXT, ["bytes", "bpe:270"], 2, 1, READING, folder)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert found["text_mb"] == pytest.approx(sum(map(len, TEXT)) / 1e6)
    assert found["documents"] == len(TEXT) and found["workers"] == 2
    assert all(rate > 0 for rate in found["floors"].values())
    by_bytes, by_bpe = found["builds"]
    assert by_bytes["alone_mb_per_second"] is by_bytes["of_alone"] is None
    assert by_bpe["of_alone"] == by_bpe["one_mb_per_second"] / by_bpe["alone_mb_per_second"]
    for row in found["builds"]:
        assert row["speedup"] == row["all_mb_per_second"] / row["one_mb_per_second"]
        assert row["a_core_mb_per_second"] == row["all_mb_per_second"] / 2
    assert [row["processes"] for row in found["reads"]] == [1, 2]
    for row in found["reads"]:
        assert row["tokens_per_second"] == pytest.approx(32 * row["samples_per_second"])
        assert row["mb_per_second"] == pytest.approx(2 * 33 * row["samples_per_second"] / 1e6)
    built = read_index(folder / "out")  # all of the text, in units that processes share
    assert sum(split["documents"] for split in built["splits"].values()) == len(TEXT)
    assert sum(split["bytes"] for split in built["splits"].values()) == sum(map(len, TEXT))
    assert len(built["splits"]["train"]["shards"]) == 8
    print_data(found)
    printed = capsys.readouterr().out
    assert "bpe:270" in printed and "sha256" in printed and "2 processes" in printed


def test_text_is_that_of_the_sources_or_of_data(texts: Path, tmp_path: Path) -> None:
    assert text_of_sources([str(texts)], 1 << 20) == TEXT
    some = text_of_sources([str(texts)], 300)
    assert some == TEXT[: len(some)]
    assert sum(map(len, some[:-1])) < 300 <= sum(map(len, some))
    small([str(texts)], tmp_path / "out", max_lost=0.1)
    train = text_of_data(tmp_path / "out", 1 << 20)
    assert train == [document for document in TEXT if document in train]
    assert len(train) == read_index(tmp_path / "out")["splits"]["train"]["documents"]
    with pytest.raises(UserError, match="fewer than two documents"):
        text_of_sources([str(texts / "000.txt")], 1 << 20)


def test_processes_read_the_micro_batches_of_a_run_between_them(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small([str(texts)], tmp_path / "out", max_lost=0.1)
    read: list[int] = []
    monkeypatch.setattr(readers.BatchReader, "read", lambda self, first, count: read.append(first))
    for number in range(3):
        clock = iter([0.0, 0.0, 1.0, 2.0, 9.0])
        monkeypatch.setattr(readers.time, "perf_counter", lambda clock=clock: next(clock))
        rate = readers._read(tmp_path / "out", 16, 4, 5.0, number, 3, lambda: None)
        assert rate == 3 * 4 / 9.0
    assert sorted(read) == list(range(0, 4 * 12, 4))


def test_the_command_reads_data_that_are_there(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small([str(texts)], out, max_lost=0.1)
    words = [str(out), "--workers", "1", "--repeats", "1", "--seconds", "0.01"]
    words += ["--sequence-length", "16", "--micro-batch", "2", "--out", str(tmp_path), "--json"]
    before = (out / "index.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["bench", "data", *words])
    assert ended.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [row["tokenizer"] for row in found["builds"]] == [str(out)]
    assert [row["processes"] for row in found["reads"]] == [1]
    assert (out / "index.json").read_bytes() == before
    assert not list(tmp_path.glob("nlscale-bench-data-*"))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "data", str(out), "--source", str(texts)])
    assert ended.value.code == 2
