"""Loss by position: against whole sequences in plain torch, whatever the pieces and the source."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import alone, described, nlscale
from generate.models import saved

import nlscale as face
from nlscale.data import TokenShards
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.evaluate.asking.sizes import lengths
from nlscale.evaluate.intervals import Ratio
from nlscale.evaluate.position import measure
from nlscale.evaluate.position.text import Text
from nlscale.generate.model import Model

ENDS = [8, 24, 64]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of bytes, and beside it the text of one document."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        words = np.random.default_rng(number).choice(["über", "a", "needle", "of", "text\n"], 80)
        (folder / f"{number}.txt").write_text(" ".join(words))
    build([str(folder)], "bytes", folder / "data", held_out=0.4)
    return folder / "data"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    saved(run, f"data.dir={data}", "model.mixer=gated-delta", "model.vocabulary=256",
          "data.document_mask=true")  # fmt: skip
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return face.load(run, "cpu")


def asked(**changes: Any) -> argparse.Namespace:
    options = {"lengths": ENDS, "contexts": 3, "data": None, "text": None, "tokenizer": None}
    options |= {"context": None, "learned": None}
    return argparse.Namespace(**options | changes)


def by_hand(model: Model, ids: np.ndarray, starts: list[int]) -> list[list[float]]:
    """Nats of each range of each context, from the logits of the whole."""
    found = []
    for start in starts:
        window = torch.from_numpy(ids[start : start + ENDS[-1] + 1])[None]
        log_p = model.logits(window[:, :-1]).double().log_softmax(-1)[0]
        nats = -log_p.gather(1, window[0, 1:, None])[:, 0]
        found.append([float(nats[a:b].sum()) for a, b in zip([0, *ENDS], ENDS, strict=False)])
    return found


def test_it_is_the_loss_of_whole_sequences_by_position(
    model: Model, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PIECE", 10)  # which ends in the middle of ranges
    monkeypatch.setattr(measure, "_ROWS", 2)
    found = measure.evaluate(model, asked(contexts=4), alone("loss"))
    shards = TokenShards(data, "validation")
    ids = shards.read(0, shards.tokens)
    starts = measure.contexts_of(
        Text("", shards.tokens, shards.read, shards.read_mask, np.zeros(1)), ENDS, 4
    )[64]
    assert len(starts) == 4 and found["contexts"] == {"64": 4}
    nats = by_hand(model, ids, starts)
    sizes = [8, 16, 40]
    for number, one in enumerate(found["positions"]):
        mine = [row[number] for row in nats]
        assert one["targets"] == 4 * sizes[number] and one["to"] == ENDS[number]
        assert one["loss"]["value"] == pytest.approx(sum(mine) / one["targets"], rel=1e-5)
        assert one["perplexity"]["value"] == pytest.approx(math.exp(one["loss"]["value"]))
        low, high = one["loss"]["interval"]
        assert low < one["loss"]["value"] < high
    text = sum(int((ids[s + 1 : s + 65] != 255).sum()) for s in starts)
    bits = sum(map(sum, nats)) / math.log(2) / text
    assert found["all"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert found["figures"]["0-64/bits_per_byte"] == found["all"]["bits_per_byte"]["value"]
    # the curve is the same targets, in finer ranges
    curve = found["curve"]
    assert [one["to"] for one in curve] == [8, 16, 23, 24, 32, 45, 64]
    assert sum(one["targets"] for one in curve) == found["all"]["targets"]


KEYS = ["level0.chunk=16", "level0.learning_rate=0.5", "level0.blocks=2"]


def test_levels_learn_from_what_they_read_in_each_context(model: Model, data: Path) -> None:
    static = measure.evaluate(model, asked(), alone("loss"))
    found = measure.evaluate(model, asked(context=KEYS), alone("loss"))
    assert not static["context"] and found["context"][0]["level"] == "level0"
    first, last = (found["positions"][i]["loss"]["value"] for i in (0, 2))
    assert first == pytest.approx(static["positions"][0]["loss"]["value"], rel=1e-5)
    assert last < static["positions"][2]["loss"]["value"] - 1e-3
    shards = TokenShards(data, "validation")
    starts = measure.contexts_of(
        Text("", shards.tokens, shards.read, shards.read_mask, np.zeros(1)), ENDS, 3
    )[64]
    rows = torch.from_numpy(np.stack([shards.read(start, 65) for start in starts]))
    losses = model.learning(3, KEYS).feed(rows)[:, 1:]
    assert found["all"]["loss"]["value"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_what_levels_have_learned_is_gone_on_from(model: Model, tmp_path: Path) -> None:
    keys, file = [*KEYS, "level0.reset=never"], tmp_path / "learned"
    losses = [
        measure.evaluate(model, asked(context=keys, learned=file), alone("loss"))["all"]["loss"][
            "value"
        ]
        for _ in range(2)
    ]
    assert losses[1] < losses[0] - 1e-3 and [*tmp_path.iterdir()] == [file]
    with pytest.raises(UserError, match="learned with another context"):
        measure.evaluate(
            model, asked(context=[*keys, "level0.pull=0.1"], learned=file), alone("loss")
        )
    with pytest.raises(UserError, match="reset=never"):
        measure.evaluate(model, asked(context=KEYS, learned=file), alone("loss"))
    (tmp_path / "text").write_text("no such thing")
    with pytest.raises(UserError, match="is not what levels have learned"):
        measure.evaluate(model, asked(context=keys, learned=tmp_path / "text"), alone("loss"))


def test_shorter_contexts_make_up_for_long_ones_that_the_text_is_too_short_for() -> None:
    text = Text("", 300, lambda first, count: np.zeros(count, np.int64), lambda a, b: None,
                np.ones(1))  # fmt: skip
    found = measure.contexts_of(text, [8, 32, 128], 10)
    assert found[128] == [0, 128] and len(found[32]) == 7 and len(found[8]) == 1
    begins = [(start, length) for length, starts in found.items() for start in starts]
    assert all(start + length < 300 for start, length in begins)
    # no two have a target in common in any range
    for low, high in ((0, 8), (8, 32), (32, 128)):
        targets = [
            target
            for start, length in begins if length >= high
            for target in range(start + low + 1, start + high + 1)
        ]  # fmt: skip
        assert len(targets) == len(set(targets))
    with pytest.raises(UserError, match=r"is 300 tokens, and a context of 300 needs 301; give"):
        measure.contexts_of(text, [8, 300], 1)


def test_a_file_is_read_with_the_tokenizer_of_the_model(
    model: Model, data: Path, tmp_path: Path
) -> None:
    shards = TokenShards(data, "validation")
    ids = shards.read(0, shards.tokens)
    texts = bytes(ids.tolist()).split(b"\xff")[:-1]
    lines = [json.dumps({"text": text.decode()}) for text in texts]
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    of_file = measure.evaluate(model, asked(text=tmp_path / "same.jsonl"), alone("loss"))
    of_data = measure.evaluate(model, asked(data=data), alone("loss"))
    assert of_file["positions"] == of_data["positions"]
    odd = tmp_path / "text.log"
    odd.write_text("x" * 100)
    assert measure.evaluate(model, asked(text=odd, contexts=1), alone("loss"))["tokens"] == 101
    odd.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no text: not UTF-8, at byte 0"):
        measure.evaluate(model, asked(text=odd), alone("loss"))


def test_data_of_another_tokenizer_are_refused(model: Model, data: Path, tmp_path: Path) -> None:
    build([str(data.parent / "1.txt"), str(data.parent / "2.txt")], "bpe:260", tmp_path / "bpe",
          held_out=0.5)  # fmt: skip
    with pytest.raises(UserError, match=r"holds ids of bpe:260, and the model was .* --text"):
        measure.evaluate(model, asked(data=tmp_path / "bpe"), alone("loss"))


def test_one_context_has_no_interval_and_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, out = tmp_path / "loss.png", tmp_path / "loss.json"
    asked = ["eval", "loss", str(run), "--lengths", "8,64", "--contexts", "1", "--context", *KEYS]
    assert (
        nlscale(*asked, "--cache", str(tmp_path), "--figure", str(figure), "--json", str(out)) == 0
    )
    printed = capsys.readouterr().out
    assert "level level0 learns from what is read: chunk 16, objective ntp" in printed
    assert "8 - 64" in printed and f"figure: {figure}" in printed
    assert figure.stat().st_size > 10_000
    said = json.loads(out.read_text())
    described("loss", said)
    assert said["document_mask"] and "was trained with documents masked" in printed
    assert said["all"]["loss"]["interval"] is None and said["contexts"] == {"64": 1}


def test_lengths_are_in_units_of_1024() -> None:
    assert lengths("256,1k,64k,1M") == [256, 1024, 65536, 1 << 20]
    for wrong in ("", "1k,256", "1k,1k", "2x", "0", "2000M"):
        with pytest.raises(argparse.ArgumentTypeError):
            lengths(wrong)


def test_the_interval_of_a_ratio_is_that_of_the_mean_where_samples_are_alike() -> None:
    from scipy import stats

    values = np.random.default_rng(0).normal(size=9)
    found = Ratio.of(values.tolist(), [2.0] * 9)
    assert found is not None and found.interval is not None
    mean, error = values.mean() / 2, values.std(ddof=1) / 3 / 2
    assert found.value == pytest.approx(mean)
    assert found.interval == pytest.approx(stats.t.interval(0.95, 8, mean, error))
    assert Ratio.of([1.0], [2.0]) == Ratio(0.5, None, 1) and Ratio.of([1.0], [0.0]) is None
