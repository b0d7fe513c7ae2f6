"""Tokenizers: no text is lost, and the separator never comes from text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.data.tokenizer import ByteTokenizer, bpe_vocabulary, load_tokenizer, train_bpe
from nlscale.errors import UserError

TEXTS = ["", "plain", "  two\r\n\n\tlines ", "naïve – 漢字 🙂 \u0000", "<|endoftext|> in text"]
CORPUS = ["the cat sat on the mat, the dog on the log. " * 20, "def f(x):\n    return x\n" * 20]


def test_bytes_are_utf8() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.name, tokenizer.vocabulary, tokenizer.separator) == ("bytes", 256, 255)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint8
        assert bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([104, 255, 105]) == "hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_bpe_round_trip_and_saving(tmp_path: Path) -> None:
    tokenizer = train_bpe(CORPUS, 280)
    assert (tokenizer.name, tokenizer.vocabulary) == ("bpe:280", 280)
    assert tokenizer.encode(CORPUS[0]).size < len(CORPUS[0]) / 2
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS + CORPUS:
        ids = loaded.encode(text)
        assert ids.dtype == np.uint16
        assert np.array_equal(ids, tokenizer.encode(text))
        assert loaded.separator not in ids
        assert loaded.decode([*ids, loaded.separator]) == text


def test_bytes_can_be_saved(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def test_smallest_bpe_is_bytes_and_separator() -> None:
    tokenizer = train_bpe(CORPUS, 257)
    assert tokenizer.encode("漢字").size == len("漢字".encode())


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary has 256"):
        ByteTokenizer().decode([256])


@pytest.mark.parametrize(
    "spec", ["byte", "bpe", "bpe:", "bpe:-5", "bpe:1.5", "bpe:256", "", "bpe:99999999"]
)
def test_wrong_names_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="bpe:"):
        bpe_vocabulary(spec)


def test_no_number_is_too_long_to_be_refused() -> None:
    with pytest.raises(UserError, match="at most") as caught:
        bpe_vocabulary("bpe:" + "9" * 5000)
    assert len(str(caught.value)) < 200


def test_too_little_text_for_a_bpe_names_the_size_that_it_gives() -> None:
    with pytest.raises(UserError, match=r"use bpe:\d+ or more text"):
        train_bpe(["abc abd"], 1000)


@pytest.mark.parametrize(
    "content",
    [None, "{", "{}", "[" * 100_000, "[]", "1"],
    ids=["none", "torn", "empty", "deep", "list", "number"],
)
def test_missing_and_torn_files(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def _altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    train_bpe(CORPUS, 280).save(folder)
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described))


def test_a_file_cannot_ask_for_texts_to_be_cut(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    _altered(tmp_path, lambda described: described.update(truncation=cut))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode(CORPUS[0])) == CORPUS[0]


@pytest.mark.parametrize("number", [280, 2**31])
def test_ids_beyond_their_number_are_refused(tmp_path: Path, number: int) -> None:
    """They would lie outside the model's embedding."""

    def change(described: dict[str, Any]) -> None:
        vocabulary = described["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = number

    _altered(tmp_path, change)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
