"""Each format in, the same documents out; and one built of all of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.corpora import PACK, left_out
from data.formats.sources import (
    STREAMS,
    TEXTS,
    parquet_of,
    read,
    texts_of,
    tokenizer,
    write_datatrove,
    write_megatron,
    write_numpy,
    write_stream,
)

from nlscale.data import TokenShards
from nlscale.data.build import build
from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError

TOKENS = ["bin", "int32 bin", "ds", "ds of 4", "npy", "big-endian npy", "int64 npy"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer()


def write_tokens(folder: Path, kind: str, texts: list[str], by: Tokenizer) -> Path:
    ids = [by.encode(text).tolist() for text in texts]
    ended = [[*one, by.separator] for one in ids]
    if kind == "bin":  # some with the separator at their end, as --append-eod makes it
        return write_megatron(folder / "t.bin", [*ended[:9], *ids[9:]], 8, "<u2")
    if kind == "int32 bin":
        return write_megatron(folder / "t.bin", ended)
    if kind in ("ds", "ds of 4"):
        return write_datatrove(folder / "t.ds", ended, width=2 if kind == "ds" else 4)
    dtype = {"npy": "<u2", "big-endian npy": ">u4", "int64 npy": "<i8"}[kind]
    return write_numpy(folder / "t.npy", ids, by.separator, dtype)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", STREAMS)
def test_every_text(tmp_path: Path, name: str, packed: str) -> None:
    path = write_stream(tmp_path, name, packed, TEXTS)
    assert texts_of(path) == TEXTS
    consumed = sum(document.consumed for document in read(path))
    whole = path.stat().st_size
    assert whole / 2 < consumed <= whole


def test_every_table_and_a_file_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_of(TEXTS))
    assert texts_of(tmp_path / "a.parquet") == TEXTS
    (tmp_path / "in").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "in" / f"{number:02d}.md").write_bytes(text.encode())
    assert texts_of(tmp_path / "in") == TEXTS


@pytest.mark.parametrize("kind", TOKENS)
def test_every_kind_of_tokens(tmp_path: Path, kind: str, bpe: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    found = read(write_tokens(tmp_path / "in", kind, TEXTS, bpe), by=bpe)
    assert [document.text for document in found] == TEXTS
    assert [document.data for document in found] == [text.encode() for text in TEXTS]
    for document, text in zip(found, TEXTS, strict=True):
        assert document.tokens is not None and document.tokens.counted is None
        assert np.array_equal(document.tokens.ids, bpe.encode(text))
    # a pattern of the shell, and a folder, have their other files
    several = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    assert len(several) == {"bin": 2, "ds": 3, "4": 3, "npy": 1}[kind.split()[-1]]
    bpe.save(tmp_path)
    for number, sources in enumerate((several, [str(tmp_path / "in")])):
        index = build(sources, str(tmp_path), tmp_path / f"out{number}", held_out=0.3)
        assert sum(split["documents"] for split in index["splits"].values()) == len(TEXTS)
        assert index["skipped"]["count"] == index["lost_files"]["count"] == 0


def test_text_and_tokens_give_the_same_data(tmp_path: Path, bpe: Tokenizer) -> None:
    """A document goes to the same split whatever it was written as: it is the same document."""
    made = {}
    (tmp_path / "by").mkdir()
    bpe.save(tmp_path / "by")
    for kind in ("text", *TOKENS):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "text":
            path = write_stream(folder, "a.jsonl", ".gz", TEXTS)
        else:
            path = write_tokens(folder, kind, TEXTS, bpe)
        index = build([str(path)], f"file:{tmp_path}/by/tokenizer.json", folder / "out")
        for split in index["splits"].values():
            del split["sources"]  # whose names differ
        made[kind] = [index["splits"], index["unigram_bits_per_byte"], index["tokenizer_sha256"]]
    assert all(one == made["text"] for one in made.values())


def test_a_build_of_all_formats(tmp_path: Path, bpe: Tokenizer) -> None:
    """Parts of the documents in each, all of which are in the shards."""
    bpe.save(tmp_path)
    source = tmp_path / "in"
    source.mkdir()
    names = [(name, packed) for name in STREAMS for packed in PACK]
    expected = []
    for number, (name, packed) in enumerate(names):
        texts = [f"{number} {text}" for text in TEXTS[:3]]
        expected += texts
        write_stream(source, name, packed, texts)
    for number, kind in enumerate(("bin", "ds", "npy")):
        texts = [f"tokens {number} {text}" for text in TEXTS[:3]]
        expected += texts
        write_tokens(source, kind, texts, bpe)
    index = build([str(source)], str(tmp_path), tmp_path / "out", held_out=0.3, max_lost=0.0)
    found = []
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out", split)
        ids = shards.read(0, shards.tokens)
        ends = np.flatnonzero(ids == bpe.separator)
        found += [bpe.decode(part) for part in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted(expected)
    assert index["left_out"] == []


def test_units_of_text_and_tokens(tmp_path: Path, bpe: Tokenizer) -> None:
    """Whoever builds them; and of the same document as text and as tokens the second is dropped."""
    bpe.save(tmp_path)
    source = tmp_path / "in"
    source.mkdir()
    write_stream(source, "a.csv", "", TEXTS[:20])
    write_stream(source, "b.tar", ".gz", TEXTS[20:])
    for kind in ("bin", "ds", "npy"):
        write_tokens(source, kind, [*TEXTS[:5], f"only {kind}", f"and {kind}"], bpe)
    made = {}
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        options = {"held_out": 0.3, "duplicates": "drop", "unit_bytes": 1000, "workers": workers}
        made[workers] = build([str(source)], str(tmp_path), out, **options)
        assert sum(s["documents"] for s in made[workers]["splits"].values()) == len(TEXTS) + 6
        assert made[workers]["duplicates"]["count"] == 15
    assert made[1] == made[2]


@pytest.mark.parametrize("by", ["bytes", "bpe:257"])
def test_tokens_are_left_out_without_their_tokenizer(
    tmp_path: Path, by: str, bpe: Tokenizer
) -> None:
    (tmp_path / "in").mkdir()
    write_stream(tmp_path / "in", "a.jsonl", "", TEXTS)
    write_tokens(tmp_path / "in", "ds", TEXTS, bpe)
    with pytest.raises(UserError, match=r"tokens without their tokenizer 1 .*file:PATH"):
        build([str(tmp_path / "in")], by, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no documents.*name the --tokenizer"):
        build([str(tmp_path / "in" / "t.ds")], by, tmp_path / "out", max_lost=1.0)
    index = build([str(tmp_path / "in")], by, tmp_path / "out", max_lost=0.9)
    assert left_out(index) == {"tokens without their tokenizer": 1}


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(tmp_path)
    path = write_megatron(tmp_path / "a.bin", [[1, 2], [3, 4, 5000]])
    says = r"a\.bin:1 has the id 5,000, and bpe:260 has no such token .*260 ids.*--tokenizer"
    with pytest.raises(UserError, match=says):
        build([str(path)], str(tmp_path), tmp_path / "out", max_lost=1.0)
    assert not (tmp_path / "out").exists()


def test_masks_of_datatrove(tmp_path: Path, bpe: Tokenizer) -> None:
    """A byte a token, of the separator at the end of each document, too."""
    ids = [[*bpe.encode(text).tolist(), bpe.separator] for text in TEXTS]
    masks = [[n % 3 == 0 for n in range(len(one))] for one in ids]
    path = write_datatrove(tmp_path / "a.ds", ids, masks)
    for document, one, mask in zip(read(path, by=bpe), ids, masks, strict=True):
        assert document.tokens is not None and document.tokens.counted is not None
        assert document.tokens.ids.tolist() == one[:-1]
        assert document.tokens.counted.tolist() == mask
    bpe.save(tmp_path)
    index = build([str(path)], str(tmp_path), tmp_path / "out", held_out=0.3)
    counted = sum(split["counted_tokens"] for split in index["splits"].values())
    assert index["format"] == 2 and counted == sum(map(sum, masks))


def test_a_separator_within_makes_two_documents(tmp_path: Path, bpe: Tokenizer) -> None:
    end = bpe.separator
    ids = [[1, 2, end, 3], [end], [end, end, 4, end], []]
    expected = [[1, 2], [3], [], [], [], [4], []]
    for path in (write_megatron(tmp_path / "a.bin", ids), write_datatrove(tmp_path / "a.ds", ids)):
        found = [document.tokens for document in read(path, by=bpe)]
        assert [tokens.ids.tolist() for tokens in found if tokens] == expected


def test_the_output_of_datatrove_as_text(tmp_path: Path) -> None:
    """Its JsonlWriter: JSON lines in gzip with text, id and metadata; ParquetWriter: a table."""
    rows = [{"text": text, "id": str(n), "metadata": {"n": n}} for n, text in enumerate(TEXTS)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "00000.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert texts_of(tmp_path / "00000.jsonl.gz") == TEXTS
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    assert texts_of(tmp_path / "00000.parquet") == TEXTS


def test_megatrons_own_builder(tmp_path: Path, bpe: Tokenizer) -> None:
    """Documents of several sequences, too, and every type of ids that it takes by itself."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    for vocabulary in (260, 1 << 20):
        path, dtype = tmp_path / f"{vocabulary}.bin", DType.optimal_dtype(vocabulary)
        builder = IndexedDatasetBuilder(str(path), dtype=dtype)
        for text in TEXTS:
            ids = torch.from_numpy(bpe.encode(text).astype(np.int64))
            for part in ids.split(50):
                builder.add_item(part)
            builder.end_document()
        builder.finalize(str(path.with_suffix(".idx")))
        assert texts_of(path, by=bpe) == TEXTS
