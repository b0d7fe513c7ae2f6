"""Every byte of a data folder against its index: what is wrong is named, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.corpora import lines, small

from nlscale.data import TokenShards
from nlscale.data.index import INDEX_NAME, read_index
from nlscale.data.look.verify import verify_data
from nlscale.data.tasks.build import build_task
from nlscale.data.verified import VERIFIED_NAME
from nlscale.errors import UserError

TRAIN = "train-000001.tar"


@pytest.fixture(params=["plain", "masked", "packed"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    source = tmp_path / "in.jsonl"
    texts = [f"text {i} " * (1 + i % 30) for i in range(40)]
    source.write_bytes(lines(texts))
    if request.param == "masked":
        with open(source, "a") as out:
            out.write(json.dumps({"text": "a part of it", "mask": [[2, 6]]}) + "\n")
    small([str(source)], tmp_path / "out", pack=64 if request.param == "packed" else None)
    return tmp_path / "out"


def change(data: Path, alter: Callable[[Any], None]) -> None:
    index = json.loads((data / INDEX_NAME).read_text())
    for split in index["splits"].values():
        split.pop("sources", None)
    alter(index)
    (data / INDEX_NAME).write_text(json.dumps(index))


def overwrite(data: Path, name: str, place: int, value: int) -> None:
    """Change a byte of a shard, and nothing that a stat shows."""
    path = data / name
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_build_is_whole_and_that_is_remembered(data: Path) -> None:
    index = read_index(data)
    before = json.loads((data / VERIFIED_NAME).read_text())
    (data / VERIFIED_NAME).unlink()
    verdict = verify_data(data, workers=2)
    assert verdict.wrong == []
    assert verdict.shards == sum(len(split["shards"]) for split in index["splits"].values())
    assert verdict.tokens == sum(split["tokens"] for split in index["splits"].values())
    assert json.loads((data / VERIFIED_NAME).read_text()) == before


def test_an_altered_byte_is_found_although_the_shard_was_remembered(data: Path) -> None:
    at = next(s for s in read_index(data)["splits"]["train"]["shards"] if s["name"] == TRAIN)
    overwrite(data, TRAIN, at["offset"] + 3, ord("!"))
    TokenShards(data, "train")  # as a run sees it
    (wrong,) = [line for line in verify_data(data).wrong if "sha256" in line]
    assert TRAIN in wrong
    known = json.loads((data / VERIFIED_NAME).read_text())
    assert TRAIN not in known and "train-000000.tar" in known
    with pytest.raises(UserError, match="sha256"):
        TokenShards(data, "train")


def test_all_that_is_wrong_is_named(data: Path) -> None:
    (data / "train-000000.tar").unlink()
    with open(data / TRAIN, "ab") as out:
        out.write(b"more")
    (data / "tokenizer.json").unlink()
    wrong = verify_data(data).wrong
    assert len(wrong) == 3
    for line, name in zip(wrong, ("train-000000.tar", TRAIN, "tokenizer.json"), strict=True):
        assert name in line


def test_an_id_outside_the_vocabulary_is_found(data: Path) -> None:
    def alter(index: Any) -> None:
        index["vocabulary"], index["separator"] = 120, 32  # x and all above it are too much

    change(data, alter)
    wrong = verify_data(data).wrong
    assert any("holds the id 255, the vocabulary has 120" in line for line in wrong)


def test_documents_and_masks_are_counted(data: Path) -> None:
    def alter(index: Any) -> None:
        index["splits"]["train"]["documents"] += 1
        if "counted_tokens" in index["splits"]["train"]:
            index["splits"]["train"]["counted_tokens"] -= 2

    change(data, alter)
    masked = read_index(data)["format"] == 2
    wrong = verify_data(data).wrong
    assert len(wrong) == 1 + masked
    assert "separators" in wrong[-1] and "train" in wrong[-1]
    assert not masked or "tokens of train count" in wrong[0]


def test_a_split_that_ends_within_a_document_is_found(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(lines([f"text {i}" for i in range(30)]))
    small([str(tmp_path / "in.jsonl")], tmp_path / "out")
    data = tmp_path / "out"
    last = read_index(data)["splits"]["train"]["shards"][-1]
    end = last["offset"] + (last["blocks"] - 1) * last["stride"]
    overwrite(data, last["name"], end + (last["tokens"] - 1) % 100, ord("x"))

    def alter(index: Any) -> None:
        content = (data / last["name"]).read_bytes()
        index["splits"]["train"]["shards"][-1]["sha256"] = hashlib.sha256(content).hexdigest()

    change(data, alter)
    documents = read_index(data)["splits"]["train"]["documents"]
    wrong = verify_data(data).wrong
    assert f"train has {documents - 1:,} separators, by the index {documents:,}" in wrong[0]
    assert "that no separator follows" in wrong[1] and len(wrong) == 2


def test_examples_of_a_task_are_no_documents(tmp_path: Path) -> None:
    build_task("task:mqar(length=32, pairs=4)", tmp_path, examples=20)
    assert verify_data(tmp_path).wrong == []

    def alter(index: Any) -> None:
        index["splits"]["train"]["documents"] += 1

    change(tmp_path, alter)
    assert "its examples" in verify_data(tmp_path).wrong[0]


def test_another_tokenizer_is_found(data: Path) -> None:
    change(data, lambda index: index.update(tokenizer_sha256="0" * 64))
    (wrong,) = verify_data(data).wrong
    assert "tokenizer is not the one" in wrong
