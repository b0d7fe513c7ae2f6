"""Documents that came before are dropped, against a list of all of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from data.building.builds import corpus, units
from data.corpora import everything, lines
from data.formats.sources import tokenizer, write_numpy

from nlscale.data import TokenShards
from nlscale.data.build import build
from nlscale.data.building import duplicates
from nlscale.data.building.duplicates import EARLIER, SAME


def reference(sources: list[str]) -> tuple[list[str], dict[str, int], int]:
    """The texts that stay, sorted, why others do not, and their bytes: one list, looked up."""
    kept: list[tuple[str, str]] = []
    origin: list[str] = []
    reasons = {SAME: 0, EARLIER: 0}
    size = 0
    for source in sources:
        for path in sorted(Path(source).iterdir()):
            text = path.read_text(encoding="utf-8")
            records = [text] if path.suffix == ".txt" else text.splitlines()
            for line in records:
                try:
                    record = json.loads(line) if path.suffix != ".txt" else {"text": line}
                except ValueError:
                    continue
                if not record["text"]:
                    continue
                entry = (record["text"], repr(record.get("mask")))
                if entry in kept:
                    same = origin[kept.index(entry)] == source
                    reasons[SAME if same else EARLIER] += 1
                    size += len(record["text"].encode())
                else:
                    kept.append(entry)
                    origin.append(source)
    return sorted(text for text, _ in kept), reasons, size


@pytest.mark.parametrize("run", [1, 7, 1000])
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
def test_each_document_stays_once_and_the_others_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: bool, run: int
) -> None:
    monkeypatch.setattr(duplicates, "_RUN", run)
    monkeypatch.setattr(duplicates, "_RANGE", 30 if run < 1000 else 1000)
    sources = corpus(tmp_path / "in", masks)
    index = units(sources, tmp_path / "out", duplicates="drop")
    kept, reasons, size = reference(sources)
    assert everything(tmp_path / "out") == kept
    found = index["duplicates"]
    assert found == {"count": sum(reasons.values()), "bytes": size, "reasons": reasons}
    assert min(reasons.values()) > 10
    if masks:  # the same text with another mask is another document
        assert len(set(kept)) < len(kept)


def test_the_first_stays(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "three", "two", "four", "four"]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    index = units([str(tmp_path / "a.jsonl")], tmp_path / "out", duplicates="drop")
    assert everything(tmp_path / "out") == ["four", "one", "three", "two"]
    assert index["duplicates"]["reasons"] == {SAME: 3}


def test_they_are_kept_unless_asked_for(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "in")
    index = units(sources, tmp_path / "out")
    assert "duplicates" not in index
    texts = everything(tmp_path / "out")
    assert len(set(texts)) < len(texts)


def test_copies_of_one_document_take_a_record_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them lie in one range of hashes, which is held in memory."""
    monkeypatch.setattr(duplicates, "_RUN", 500)
    held: list[int] = []
    parts = duplicates._parts

    def counted(*where: Any) -> Any:
        for part in parts(*where):
            held.append(len(part))
            yield part

    monkeypatch.setattr(duplicates, "_parts", counted)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        texts = ["again and again"] * 1990 + [f"{name} {i}" for i in range(10)]
        (tmp_path / name / "x.jsonl").write_bytes(lines(texts))
    sources = [str(tmp_path / name) for name in ("a", "b")]
    index = units(sources, tmp_path / "out", duplicates="drop")
    assert index["duplicates"]["reasons"] == {SAME: 1989, EARLIER: 1990}
    assert len(everything(tmp_path / "out")) == 21
    assert sum(held) == 20 + 8  # those that differ, and one of each of eight runs


def test_masks_that_count_the_same_are_the_same(tmp_path: Path) -> None:
    masks = [None, [[0, 4]], [[0, 2], [2, 4]], [[2, 4], [0, 3]], [[1, 2]], [[1, 1], [1, 2]], []]
    records = [{"text": "text", "mask": mask} for mask in masks]
    records += [{"text": f"other {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    index = units([str(tmp_path / "a.jsonl")], tmp_path / "out", duplicates="drop")
    assert index["duplicates"]["count"] == 4
    assert everything(tmp_path / "out").count("text") == 3


@pytest.mark.parametrize("drops", [False, True], ids=["keep", "drop"])
def test_tokens_are_compared_as_tokens(tmp_path: Path, drops: bool) -> None:
    """Halves of a character are the same text; tokens of no text are no empty document."""
    by = tokenizer()
    (tmp_path / "by").mkdir()
    by.save(tmp_path / "by")
    halves = by.encode("é").tolist()
    assert len(halves) == 2
    start = by.encode("a text").tolist()
    documents = [[*start, halves[0]], [*start, halves[1]], [*start, halves[0]], [], start]
    write_numpy(tmp_path / "a.npy", documents, by.separator)
    out = tmp_path / "out"
    index = units(
        [str(tmp_path / "a.npy")], out, str(tmp_path / "by"), duplicates="drop" if drops else "keep"
    )
    wanted = [tuple(ids) for ids in documents if ids]
    if drops:
        wanted = list(dict.fromkeys(wanted))
    found = []
    for split in ("train", "validation"):
        shards = TokenShards(out, split)
        ids = shards.read(0, shards.tokens)
        cut = np.split(ids, np.flatnonzero(ids == by.separator) + 1)
        found += [tuple(part[:-1].tolist()) for part in cut if len(part)]
    assert sorted(found) == sorted(wanted)
    assert index["empty_documents"] == 1
    if drops:
        assert index["duplicates"]["count"] == 1


def test_tokens_are_the_same_where_their_ids_are(tmp_path: Path) -> None:
    """Incomplete characters all become U+FFFD, and tokens that control a model no text at all."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    carrier = hf.Tokenizer(hf.models.BPE(vocabulary, []))
    carrier.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    carrier.decoder = hf.decoders.ByteLevel()
    carrier.add_special_tokens(specials)
    carrier.save(str(tmp_path / "tokenizer.json"))

    letters = [carrier.token_to_id(letter) for letter in "abc"]
    first, second = (carrier.encode(letter).ids[0] for letter in "éā")  # of two bytes each
    given = [[*letters, first], [*letters, second], letters, [1, 2], [2, 1], [1, 2], [], letters]
    ids = [number for document in given for number in [*document, 0]]
    np.save(tmp_path / "a.npy", np.array(ids, dtype="<u2"))
    for choice, count in (("keep", 7), ("drop", 5)):
        out = tmp_path / choice
        named = f"file:{tmp_path}/tokenizer.json"
        index = build([str(tmp_path / "a.npy")], named, out, held_out=0.3, duplicates=choice)
        found: list[tuple[int, ...]] = []
        for split in ("train", "validation"):
            shards = TokenShards(out, split)
            text = shards.read(0, shards.tokens).astype("<u2").tolist()
            ends = [-1, *(i for i, number in enumerate(text) if number == 0)]
            found += [tuple(text[a + 1 : b]) for a, b in pairwise(ends)]
        expected = [tuple(document) for document in given if document]
        assert set(found) == set(expected) and len(found) == count
        assert index["empty_documents"] == 1
    assert index["duplicates"]["count"] == 2
