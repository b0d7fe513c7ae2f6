"""Training on documents that were packed whole into samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import world
from data.corpora import small
from train.test_train_run import SMALL, records, run

from nlscale.config import recipe
from nlscale.data import BatchReader, Samples, TokenShards, read_index
from nlscale.errors import UserError
from nlscale.train.prepare import prepare


def test_what_is_packed_is_read_at_its_length_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n} {n}"}}\n' for n in range(400)))
    small([str(tmp_path / "a.jsonl")], tmp_path / "out", pack=32)
    given = [*SMALL, f"data.dir={tmp_path}/out"]
    with pytest.raises(UserError, match=r"packed into samples of 32 tokens, and .* is 33, which"):
        prepare(recipe.load(None, [*given, "data.sequence_length=33"]).config)
    (note,) = prepare(recipe.load(None, given).config).notes
    assert "data.document_mask is false" in note
    assert prepare(recipe.load(None, [*given, "data.document_mask=true"]).config).notes == []
    for wrong in ({"length": 31}, {"length": 0}, {"cut": 3}):
        index = json.loads((tmp_path / "out" / "index.json").read_text())
        index["packed"] |= wrong
        (tmp_path / "changed").mkdir(exist_ok=True)
        (tmp_path / "changed" / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"index\.json cannot be used: .*packed"):
            read_index(tmp_path / "changed")


@pytest.mark.parametrize("document_mask", ["true", "false"])
def test_a_run_counts_what_the_packing_says_counts(tmp_path: Path, document_mask: str) -> None:
    texts = "".join(f'{{"text": "{"ab" * (n % 20)}{n}"}}\n' for n in range(400))
    (tmp_path / "a.jsonl").write_text(texts)
    small([str(tmp_path / "a.jsonl")], tmp_path / "out", pack=32)
    given = [f"data.dir={tmp_path}/out", f"data.document_mask={document_mask}", "train.steps=2"]
    (summary,) = world.run(1, run, [*given, f"run.dir={tmp_path}/run"])
    assert summary["steps"] == 2
    masks = BatchReader(Samples(TokenShards(tmp_path / "out"), 32), 1234).masks(0, 16)
    assert masks is not None and not masks[:, 32].any()
    assert records(tmp_path / "run", "train")[-1]["counted_tokens"] == masks[:, 1:].sum()
    said = (tmp_path / "run" / "train.log").read_text()
    assert ("are packed into samples with others" in said) == (document_mask == "false")
