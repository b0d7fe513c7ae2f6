"""Tokenizers of our own as transformers reads them from an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers as hf
import torch
from transformers import AutoTokenizer

from nlscale.checkpoint.export.tokenizer import write_tokenizer
from nlscale.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

TEXTS = [
    "", "a", "  two  spaces and\r\n\ttabs ", "Grüße, 世界 🎉 \u200b\ufeff", "\x00\x1f\x7f",
    "e\u0301 a text that mentions <|endoftext|> <|endoftext|>",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_tokenizer_is_ours_on_any_text(kind: str, tmp_path: Path) -> None:
    ours: Tokenizer = ByteTokenizer()
    if kind == "bpe":
        ours = train_bpe(["levels of levels, and periods of periods; Grüße" for _ in range(9)], 280)
    assert write_tokenizer(ours, tmp_path) == ["tokenizer.json", "tokenizer_config.json"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).name == ours.name
    assert (len(theirs), theirs.eos_token_id) == (ours.vocabulary, ours.separator)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == text
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):  # what a model may write: bytes that are no UTF-8, separators among them
        ids = torch.randint(ours.vocabulary, (12,), generator=generator).tolist()
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_template_that_begins_texts_is_left_out(tmp_path: Path) -> None:
    train_bpe(["levels of levels, and periods of periods" for _ in range(9)], 265).save(tmp_path)
    carrier = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begin = carrier.token_to_id("a")
    carrier.post_processor = hf.processors.TemplateProcessing("a $A", None, [("a", begin)])
    carrier.save(str(tmp_path / "tokenizer.json"))
    assert carrier.encode("levels").ids[0] == begin
    ours = load_tokenizer(tmp_path)
    write_tokenizer(ours, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("levels")["input_ids"] == ours.encode("levels").tolist()
    assert theirs.bos_token is None and theirs.eos_token_id == ours.separator
