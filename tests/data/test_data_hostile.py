"""An index or a shard that somebody made on purpose: one line, and nothing else is opened."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.corpora import small
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.data import TokenShards, read_index
from nlscale.errors import UserError

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "in").mkdir()
    for i in range(30):
        (folder / "in" / f"{i:02d}.txt").write_text(f"text number {i}, " * 9)
    small([str(folder / "in")], folder / "out")
    return folder / "out"


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return Path(shutil.copytree(built, tmp_path / "data"))


def shard(index: dict[str, Any], number: int = 0) -> dict[str, Any]:
    return index["splits"]["train"]["shards"][number]


def refused(data: Path, change: Change, says: str) -> None:
    path = data / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    for use in (read_index, TokenShards):
        with pytest.raises(UserError, match=says) as caught:
            use(data)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(path))


NAMES = ["../elsewhere.tar", "/etc/hostname", "a/b.tar", "..", ".", "", "a\0b", "a\nb", "\ud800"]
NAMES += ["x" * 300, None, 5, ["a"], ".hidden"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_shard_lies_in_the_folder(data: Path, name: Any) -> None:
    says = r"splits\.train\.shards\[0\]\.name is .*the name of a file in this folder"
    refused(data, lambda index: shard(index).update(name=name), says)


def test_a_shard_is_named_once(data: Path) -> None:
    says = r"shards\[1\]\.name is 'train-000000\.tar'"
    refused(data, lambda index: shard(index, 1).update(name=shard(index)["name"]), says)


KEYS = ["block_tokens", "vocabulary", "separator", "empty_documents", "unigram_bits_per_byte"]
KEYS += ["splits.train.tokens", "splits.train.documents", "splits.validation.bytes"]
KEYS += [f"splits.train.shards.0.{key}" for key in ("tokens", "blocks", "size_bytes", "offset")]
KEYS += ["splits.train.shards.0.stride", "skipped.count"]
VALUES = [-1, 10**40, 1e400, math.nan, -0.5, True, "7", None, [1], {"a": 1}]
TEXTS = ["fingerprint", "tokenizer", "dtype", "splits.train.shards.0.sha256", "sources.0"]
TEXTS += ["skipped", "splits", "splits.train", "splits.train.shards", "sources"]


def put(index: Any, key: str, value: Any) -> None:
    *way, last = key.split(".")
    for word in way:
        index = index[int(word)] if word.isdecimal() else index[word]
    index[int(last) if last.isdecimal() else last] = value


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("key", KEYS)
def test_numbers_are_numbers(data: Path, key: str, value: Any) -> None:
    if key == "unigram_bits_per_byte" and value == 10**40:
        return  # absurd, but a number
    refused(data, lambda index: put(index, key, value), r"index\.json")


@pytest.mark.parametrize("value", [5, None, "", "x\0", [["a"]], [{}]], ids=range(6))
@pytest.mark.parametrize("key", TEXTS)
def test_texts_are_texts(data: Path, key: str, value: Any) -> None:
    if key in ("fingerprint", "tokenizer", "sources.0") and isinstance(value, str):
        return
    refused(data, lambda index: put(index, key, value), r"index\.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: put(index, "vocabulary", 257), "vocabulary is 257"),
        (lambda index: put(index, "separator", 256), "separator is 256"),
        (lambda index: put(index, "dtype", "object"), "dtype is 'object'"),
        (lambda index: index["splits"]["train"].update(tokens=5), r"splits\.train\.tokens is 5"),
        (lambda index: index["splits"].update({"../x": index["splits"]["train"]}), "splits is"),
        (lambda index: shard(index).update(stride=0), r"shards\[0\]\.stride is 0"),
        (lambda index: shard(index).update(blocks=1), r"shards\[0\]\.blocks is 1"),
        (lambda index: shard(index).update(offset=10**6), r"shards\[0\]\.size_bytes is"),
        (lambda index: index.pop("dtype"), "dtype is missing"),
        (lambda index: index.update(format=True), "format a bool"),
        (lambda index: index.update(format=1.0), "format a float"),
        (lambda index: index.update(lost_files=[]), "lost_files is a list"),
    ],
)
def test_figures_agree(data: Path, change: Change, says: str) -> None:
    refused(data, change, says)


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"format": NaN}', b"\xff\xfe", b"\x00" * 9, b'{"format": ' + b"1" * 9999],
    ids=["deep", "nan", "utf-16", "nul", "long"],
)
def test_an_index_that_is_no_json(data: Path, content: bytes) -> None:
    (data / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json") as caught:
        read_index(data)
    assert "\n" not in str(caught.value)


def test_pipes_are_not_waited_for(data: Path) -> None:
    (data / ".verified.json").unlink(missing_ok=True)
    os.mkfifo(data / ".verified.json")
    TokenShards(data).read(0, 5)
    (data / "train-000000.tar").unlink()
    os.mkfifo(data / "train-000000.tar")
    with pytest.raises(UserError, match="is not a file"):
        TokenShards(data)
    (data / "index.json").unlink()
    os.mkfifo(data / "index.json")
    with pytest.raises(UserError, match="is not a file"):
        read_index(data)


def test_links_are_followed_as_whoever_made_the_folder_meant(data: Path) -> None:
    (data / "train-000001.tar").rename(data.parent / "elsewhere.tar")
    (data / "train-000001.tar").symlink_to("../elsewhere.tar")
    (data.parent / "link").symlink_to(data)
    assert TokenShards(data.parent / "link").read(0, 9).shape == (9,)


def test_ids_outside_the_vocabulary_are_not_read(data: Path) -> None:
    """A model would look them up beyond the end of its embedding."""

    index = json.loads((data / "index.json").read_text())
    entry = shard(index)
    content = bytearray((data / entry["name"]).read_bytes())
    content[entry["offset"] + 3] = 255
    (data / entry["name"]).write_bytes(content)
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    index["vocabulary"], index["separator"] = 200, 5
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"train-000000\.tar was altered: it holds the id 255"):
        TokenShards(data).read(0, 9)


def test_yesterdays_index_can_be_read(data: Path) -> None:
    index = json.loads((data / "index.json").read_text())
    for key in ("text_field", "lost_files", "left_out"):
        del index[key]
    del index["skipped"]["reasons"]
    (data / "index.json").write_text(json.dumps(index))
    assert read_index(data) == index
    # and the same command does nothing
    assert small([str(_sources(index))], data) == index


def _sources(index: dict[str, Any]) -> Path:
    return Path(index["sources"][0])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@examples(200)
@given(where=st.integers(0, 10**6), value=json_values, remove=st.booleans())
def test_any_alteration_is_refused_or_harmless(
    built: Path, tmp_path_factory: pytest.TempPathFactory, where: int, value: Any, remove: bool
) -> None:
    """One value of the index is another, of any type: the shards are opened in vain or read."""
    index = json.loads((built / "index.json").read_text())
    places = list(_places(index))
    inside, key = places[where % len(places)]
    if remove:
        del inside[key]
    else:
        inside[key] = value
    folder = tmp_path_factory.mktemp("any") / "data"
    folder.mkdir()
    for path in built.glob("*.tar"):
        os.link(path, folder / path.name)
    (folder / "index.json").write_text(json.dumps(index))
    try:
        for split in read_index(folder)["splits"]:
            shards = TokenShards(folder, split, verify=False)
            shards.read(0, shards.tokens)
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder.parent)


def _places(value: Any) -> Any:
    """Every container in a JSON value, with every key of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])
