"""From records with a prompt and a completion to a run whose loss is that of completions."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import world
from train.test_train_run import SMALL, records, run

from nlscale import cli
from nlscale.config import recipe
from nlscale.data import TokenShards, read_index
from nlscale.errors import UserError
from nlscale.train.prepare import prepare


def built(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A data folder of such records, made by `nlscale data build`."""
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = ["--out", str(folder / "out"), "--held-out", "0.2"]
    source = ["--source", str(folder / "in.jsonl"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "build", *source, *out])
    assert not ended.value.code
    return folder / "out"


def sums(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(count)]
    return [{"prompt": f"What is {a} + {b}? ", "completion": f"It is {a + b}."} for a, b in pairs]


def test_a_run_on_completions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = sums(120)
    data = built(tmp_path, rows)
    splits = read_index(data)["splits"].values()
    counted = sum(len(row["completion"]) + 1 for row in rows)
    assert sum(split["counted_tokens"] for split in splits) == counted
    share = [f"{s['counted_tokens']:,} ({s['counted_tokens'] / s['tokens']:.1%})" for s in splits]
    said = capsys.readouterr().out
    assert "tokens that count" in said and all(each in said for each in share)

    here = [f"data.dir={data}", f"run.dir={tmp_path / 'run'}", "train.steps=3", "levels=[1]"]
    (summary,) = world.run(1, run, here)
    reader, found = prepare(recipe.load(None, [*SMALL, *here]).config).readers[0], 0
    for number, record in enumerate(records(tmp_path / "run", "train")):
        masks = reader.masks(8 * number, 8)
        assert masks is not None
        found += int(masks[:, 1:].sum())
        tokens = 8 * 32 * (number + 1)
        assert (record["tokens"], record["counted_tokens"]) == (tokens, found)
        assert 0 < found < tokens and record["loss"] > 0
    last = records(tmp_path / "run", "validation")[-1]
    assert summary["val_bits_per_byte"] == last["bits_per_byte"]
    per_token = TokenShards(data, "validation").bytes_per_token
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2) / per_token)
    # a completion and its separator
    assert per_token == pytest.approx(
        1 - 1 / np.mean([len(r["completion"]) + 1 for r in rows]), 0.02
    )


def test_data_of_which_nothing_counts_are_refused(tmp_path: Path) -> None:
    data = built(tmp_path, [{"prompt": f"only {i} " * 9, "completion": ""} for i in range(30)])
    with pytest.raises(UserError, match="no token of the train split") as caught:
        prepare(recipe.load(None, [*SMALL, f"data.dir={data}"]).config)
    assert "\n" not in str(caught.value)
