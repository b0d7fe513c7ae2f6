"""Masks: which tokens of a document count, from the record to what a batch is read with."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from data.corpora import small
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.data import BatchReader, Samples, TokenShards, read_index
from nlscale.data.build import build
from nlscale.data.documents import Document, read_documents
from nlscale.data.index import Index
from nlscale.data.sources import find_files
from nlscale.data.spans import tokens_that_count
from nlscale.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from nlscale.data.writer import DataWriter
from nlscale.errors import UserError

BLOCK = 100
BYTES, BPE = ByteTokenizer(), train_bpe(["ä€ 𝄞 plain words, more plain words 𝄞 €"] * 3, 276)


def count(text: str, spans: list[tuple[int, int]], encoder: Tokenizer) -> list[bool]:
    """Which tokens count, byte by byte: a token does if a character that it has a byte of does."""
    inside = {i for start, end in spans for i in range(start, end)}
    of_bytes = [i in inside for i, c in enumerate(text) for _ in c.encode()]
    counts, at = [], 0
    for token in encoder.encode(text):
        size = int(encoder.byte_lengths()[token])
        counts.append(any(of_bytes[at : at + size]))
        at += size
    assert at == len(of_bytes)
    return [*counts, len(text) - 1 in inside]


@examples(150)
@given(data=st.data(), text=st.text("ab ä€𝄞", min_size=1, max_size=12))
def test_a_token_counts_if_one_of_its_characters_does(data: st.DataObject, text: str) -> None:
    bound = st.integers(0, len(text))
    spans = [tuple(sorted(data.draw(st.tuples(bound, bound)))) for _ in range(2)]
    for encoder in (BYTES, BPE):
        ids = encoder.encode(text)
        found = tokens_that_count(text, tuple(spans), ids, encoder.byte_lengths())
        assert found.tolist() == count(text, spans, encoder)


def test_tokens_of_another_text_are_noticed() -> None:
    with pytest.raises(ValueError, match="3 bytes"):
        tokens_that_count("abc", (), BYTES.encode("ab"), BYTES.byte_lengths())


def documents_of(path: Path) -> list[Document]:
    (file,) = find_files([str(path)]).files
    return list(read_documents(file))


RECORDS: list[tuple[dict[str, Any], str, Any]] = [
    ({"text": "abcdef", "mask": [[1, 3], [5, 6]]}, "abcdef", ((1, 3), (5, 6))),
    ({"text": "abcdef", "mask": []}, "abcdef", ()),
    ({"text": "abcdef", "mask": None}, "abcdef", None),
    ({"text": "abcdef"}, "abcdef", None),
    ({"prompt": "ä?", "completion": "yes"}, "ä?yes", ((2, 5),)),
    ({"prompt": "why", "completion": ""}, "why", ((3, 3),)),
    ({"text": "own", "prompt": "a", "completion": "b"}, "own", None),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_records_say_what_counts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = [record for record, _, _ in RECORDS]
    content = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(content)
    assert [(d.text, d.spans) for d in documents_of(path)] == [(t, s) for _, t, s in RECORDS]


def test_columns_say_what_counts(tmp_path: Path) -> None:
    table = {"text": ["abc", "def", "ghi"], "mask": [[[0, 2]], None, [[2, 9]]]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = documents_of(tmp_path / "a.parquet")
    assert [d.spans for d in found] == [((0, 2),), None, None]
    assert [d.kind for d in found] == ["", "", "mask outside the text"]
    table = {"completion": ["y", None], "more": [1, 2], "prompt": ["x?", "z"]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    found = documents_of(tmp_path / "b.parquet")
    assert (found[0].text, found[0].spans) == ("x?y", ((2, 3),))
    assert found[1].kind == "'completion' not a string"


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ('"text": "abc", "mask": [[0, 4]]', "mask outside the text"),
        ('"text": "abc", "mask": [[-1, 2]]', "mask outside the text"),
        ('"text": "abc", "mask": [[0, 1], [2, 1]]', "mask reversed"),
        ('"text": "abc", "mask": [[0.5, 1]]', "mask not whole numbers"),
        ('"text": "abc", "mask": [[0, NaN]]', "mask not whole numbers"),
        (f'"text": "abc", "mask": [[0, {"9" * 5000}]]', "mask not whole numbers"),
        ('"text": "abc", "mask": [[false, true]]', "mask not whole numbers"),
        ('"text": "abc", "mask": [["0", "1"]]', "mask not whole numbers"),
        ('"text": "abc", "mask": [0, 1, 1]', "mask not spans"),
        ('"text": "abc", "mask": [[0, 1, 2]]', "mask not spans"),
        ('"text": "abc", "mask": "0-1"', "mask not spans"),
        ('"text": "abc", "mask": {"start": 0}', "mask not spans"),
        ('"prompt": "a", "completion": "b", "mask": [[0, 1]]', "two masks"),
        ('"prompt": "a", "completion": 5', "'completion' not a string"),
        ('"prompt": "a"', "no such field"),
    ],
)
def test_a_mask_that_cannot_be_is_a_document_that_cannot_be_read(
    tmp_path: Path, record: str, kind: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f"{{{record}}}\n")
    (document,) = documents_of(tmp_path / "a.jsonl")
    assert document.kind == kind and document.error and not document.data
    assert "\n" not in document.error


def conversation(number: int) -> dict[str, Any]:
    """A record: most say what counts, in one of two ways, some do not."""
    question, answer = f"{number} wieviel ä? " * (number % 5 + 1), f"{number}€. " * (number % 7)
    if number % 4 == 0:
        return {"text": f"{question}{answer}"}
    if number % 4 == 1:
        return {"text": f"{question}{answer}", "mask": [[3, 5], [len(question) - 2, len(question)]]}
    return {"prompt": question, "completion": answer}


def expected(record: dict[str, Any], encoder: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a record with their separator, and which count."""
    text = record.get("text", record.get("prompt", "") + record.get("completion", ""))
    ids = [*encoder.encode(text).tolist(), encoder.separator]
    if "prompt" in record:
        return ids, count(text, [(len(record["prompt"]), len(text))], encoder)
    return ids, count(text, record["mask"], encoder) if "mask" in record else [True] * len(ids)


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations in blocks and shards that documents cross, and that no byte of bits fills."""
    folder = tmp_path_factory.mktemp("masks")
    (folder / "in.jsonl").write_text("\n".join(json.dumps(conversation(i)) for i in range(60)))
    options = {"held_out": 0.2, "shard_tokens": 5 * BLOCK, "block_tokens": BLOCK}
    build([str(folder / "in.jsonl")], request.param, folder / "out", **options)
    return folder / "out"


def whole(data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of a split and what counts of them, by plain webdataset."""
    urls = [str(data / shard["name"]) for shard in read_index(data)["splits"][split]["shards"]]
    ids, masks = [], []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        ids.append(np.frombuffer(sample["tokens.bin"], read_index(data)["dtype"]))
        bits = np.frombuffer(sample["mask.bin"], np.uint8)
        assert len(bits) == math.ceil(BLOCK / 8)
        masks.append(np.unpackbits(bits, bitorder="little", count=len(ids[-1])).astype(bool))
    return np.concatenate(ids), np.concatenate(masks)


def test_what_is_read_counts_as_the_records_say(built: Path) -> None:
    encoder, found = load_tokenizer(built), Counter[str]()
    want = Counter(repr(expected(conversation(i), encoder)) for i in range(60))
    for split in ("train", "validation"):
        shards = TokenShards(built, split)
        ids, mask = shards.read(0, shards.tokens), shards.read_mask(0, shards.tokens)
        assert mask is not None and mask.dtype == np.bool_
        by_webdataset = whole(built, split)
        assert np.array_equal(ids, by_webdataset[0]) and np.array_equal(mask, by_webdataset[1])
        ends = np.flatnonzero(ids == shards.separator) + 1
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            found[repr((ids[start:end].tolist(), mask[start:end].tolist()))] += 1
    assert found == want


def test_any_range_of_a_mask_can_be_read(built: Path) -> None:
    shards, (_, mask) = TokenShards(built), whole(built, "train")
    random, end = np.random.default_rng(0), shards.tokens
    assert len(shards.shards) > 2 and end % BLOCK
    ranges = [(0, 0), (0, end), (end - 1, 1), (end, 0), (BLOCK - 1, 2), (5 * BLOCK - 3, 9)]
    for start in random.integers(0, end, 200):
        ranges.append((int(start), int(random.integers(0, end - start + 1))))
    for start, size in ranges:
        assert np.array_equal(shards.read_mask(start, size), mask[start : start + size])
    for start, size in ((-1, 2), (0, end + 1), (3, -1)):
        with pytest.raises(IndexError):
            shards.read_mask(start, size)


def test_offsets_of_masks_are_those_of_the_tar(built: Path) -> None:
    for shard in read_index(built)["splits"]["train"]["shards"]:
        with tarfile.open(built / shard["name"]) as tar:
            found = {member.name: member.offset_data for member in tar}
        starts = [i * shard["stride"] for i in range(shard["blocks"])]
        ids, masks = ([n for n in found if n.endswith(e)] for e in ("tokens.bin", "mask.bin"))
        assert [found[name] for name in ids] == [shard["offset"] + s for s in starts]
        assert [found[name] for name in masks] == [shard["mask_offset"] + s for s in starts]
        assert len(found) == 2 * shard["blocks"]


def test_figures_are_of_what_counts(built: Path) -> None:
    lengths = load_tokenizer(built).byte_lengths()
    index, counted = read_index(built), {}
    for split in ("train", "validation"):
        ids, mask = whole(built, split)
        counted[split] = ids[mask]
        entry = index["splits"][split]
        size = int(lengths[ids[mask]].sum())
        assert (entry["counted_tokens"], entry["counted_bytes"]) == (mask.sum(), size)
        assert 0 < size < entry["bytes"] == lengths[ids].sum()
        shards = TokenShards(built, split)
        assert shards.counted_tokens == mask.sum()
        assert shards.bytes_per_token == size / mask.sum()
    train = np.bincount(counted["train"], minlength=index["vocabulary"]) + 1
    bits = -np.log2(train / train.sum())[counted["validation"]].sum() / size
    assert index["unigram_bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_masks_are_read_with_their_samples(built: Path) -> None:
    (ids, mask), samples = whole(built, "train"), Samples(TokenShards(built), 30)
    want = Counter[str]()
    for i in range(len(samples)):
        part = slice(i * 30, i * 30 + 31)
        assert np.array_equal(samples.mask(i), mask[part])
        want[repr((ids[part].tolist(), mask[part].tolist()))] += 1
    with pytest.raises(IndexError):
        samples.mask(len(samples))
    reader = BatchReader(samples, seed=3)
    rows, masks = reader.read(0, len(samples)), reader.masks(0, len(samples))
    assert masks is not None and masks.shape == rows.shape
    pairs = zip(rows.tolist(), masks.tolist(), strict=True)
    assert Counter(repr(pair) for pair in pairs) == want
    later = reader.masks(7, 4)
    assert np.array_equal(later, masks[7:11])


def test_sources_whose_masks_change_meanwhile_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "mask": [[0, 1]]}\n')

    def change(out: Path) -> None:
        out.mkdir(exist_ok=True)
        path.write_text('{"text": "one"}\n{"text": "two", "mask": [[0, 2]]}\n')

    monkeypatch.setattr("nlscale.data.building.settle.clear", change)
    with pytest.raises(UserError, match="changed while"):
        small([str(path)], tmp_path / "out")


def test_folders_without_masks_are_what_they_always_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(40):
        path = Path("in") / f"{i:03d}.txt"
        path.write_bytes(f"document {i}: {'äb c' * (i * 7 % 31)}".encode())
        os.utime(path, (1, 1))
    index = small(["in"], Path("out"))
    said = json.loads(Path("out/index.json").read_text())
    del said["tokenizer_sha256"]  # which, as what came of each source, is new
    for split in said["splits"].values():
        del split["sources"]
    digest = hashlib.sha256(f"{json.dumps(said, indent=1)}\n".encode()).hexdigest()
    assert digest == "c4c7f52782ecca17f481b7a85a6b2b4a181b9d8aa56d8f32aa106a0fae50e0c6"
    assert index["format"] == 1
    samples = Samples(TokenShards("out"), 20)
    assert samples.mask(0) is None and BatchReader(samples, 1).masks(0, 3) is None


def written(out: Path, encoder: Tokenizer, masked: bool = True) -> DataWriter:
    out.mkdir(exist_ok=True)
    return DataWriter(out, encoder, shard_blocks=2, block_tokens=16, masked=masked)


def test_tokens_are_written_as_a_program_gives_them(tmp_path: Path) -> None:
    writer, random = written(tmp_path, BYTES), np.random.default_rng(1)
    examples = [(random.integers(0, 256, 21), random.integers(0, 2, 21) > 0) for _ in range(6)]
    writer.add("ab", b"ab", "train", ((1, 2),))
    for ids, mask in examples:
        writer.add_tokens(ids, mask, "train")
    writer.add_tokens(*examples[0], "validation")
    writer.close()
    entry = writer.splits()["train"]
    size = 2 + sum(int((ids != 255).sum()) for ids, _ in examples)
    assert (entry["documents"], entry["tokens"], entry["bytes"]) == (7, 6 * 21 + 3, size)
    text = {"tokenizer": "bytes", "vocabulary": 256, "separator": 255, "dtype": "uint8"}
    index = {**text, "format": writer.format, "fingerprint": "", "sources": [], "block_tokens": 16}
    index |= {"splits": writer.splits(), "skipped": {"count": 0, "first": []}}
    index |= {"empty_documents": 0, "unigram_bits_per_byte": writer.unigram_bits_per_byte()}
    (tmp_path / "index.json").write_text(json.dumps(index))
    shards = TokenShards(tmp_path)
    ids, mask = [97, 98, 255], [False, True, True]
    for more, counts in examples:
        ids, mask = [*ids, *more], [*mask, *counts]
    assert shards.read(0, shards.tokens).tolist() == ids
    assert shards.read_mask(0, shards.tokens).tolist() == mask  # type: ignore[union-attr]


class Symbols(ByteTokenizer):
    """Ids that stand for no text."""

    byte_lengths = Tokenizer.byte_lengths


def test_tokens_that_stand_for_no_text_have_no_bits_per_byte(tmp_path: Path) -> None:
    writer = written(tmp_path, Symbols())
    for split in ("train", "validation"):
        writer.add_tokens(np.arange(9), np.arange(9) > 4, split)
    writer.close()
    assert writer.unigram_bits_per_byte() is None
    assert [entry["counted_bytes"] for entry in writer.splits().values()] == [0, 0]


@pytest.mark.parametrize(
    ("ids", "mask", "masked", "says"),
    [
        ([1, 2], [True], True, "not"),
        ([[1, 2]], [[True, True]], True, "not"),
        ([1, 2], [1, 0], True, "bool"),
        ([1, 256], [True, True], True, "from 1 to 256"),
        ([-1, 2], [True, True], True, "from -1"),
        ([1, 2], [True, False], False, "without masks"),
    ],
)
def test_tokens_that_cannot_be_written(
    tmp_path: Path, ids: list, mask: list, masked: bool, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        written(tmp_path, BYTES, masked).add_tokens(np.array(ids), np.array(mask), "train")


def test_a_mask_has_no_place_in_a_folder_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without masks"):
        written(tmp_path, BYTES, masked=False).add("a", b"a", "train", ())


Change = Callable[[dict[str, Any]], object]


def shard(index: dict[str, Any]) -> dict[str, Any]:
    return index["splits"]["train"]["shards"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: shard(index).pop("mask_offset"), "mask_offset is missing"),
        (lambda index: shard(index).update(mask_offset=-1), "mask_offset is -1"),
        (lambda index: shard(index).update(mask_offset=10**40), "mask_offset is 1000"),
        (lambda index: shard(index).update(mask_offset="512"), "mask_offset is '512'"),
        (lambda index: shard(index).update(mask_offset=1536), "mask_offset is 1536"),
        (lambda index: shard(index).update(stride=1100), "stride is 1100"),
        (lambda index: shard(index).update(offset=512 + 12), "mask_offset is 512"),
        (lambda index: index["splits"]["train"].pop("counted_tokens"), "counted_tokens is missing"),
        (lambda index: index["splits"]["train"].update(counted_tokens=10**6), "counted_tokens is"),
        (lambda index: index["splits"]["train"].update(counted_bytes=None), "counted_bytes is"),
        (lambda index: index.update(unigram_bits_per_byte=None), "unigram_bits_per_byte is"),
        (lambda index: index.update(format=1), "mask_offset is 512, and must be left"),
        (lambda index: index.update(format=3), "formats 1 and 2"),
    ],
)
def test_an_index_that_says_of_masks_what_cannot_be(
    built: Path, tmp_path: Path, change: Change, says: str
) -> None:
    data = Path(shutil.copytree(built, tmp_path / "data"))
    index: Index = json.loads((data / "index.json").read_text())
    change(index)  # type: ignore[arg-type]
    (data / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=says) as caught:
        TokenShards(data)
    assert "\n" not in str(caught.value)
