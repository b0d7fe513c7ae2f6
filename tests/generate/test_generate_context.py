"""Streams of a model that changes inside the context: pieces, rows, single tokens, files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from generate.models import VOCABULARY, random_tokens, saved

import nlscale
from nlscale.checkpoint.export.huggingface import export_huggingface
from nlscale.data.tokenizer import SymbolTokenizer
from nlscale.errors import UserError
from nlscale.generate import state_file
from nlscale.generate.model import Model
from nlscale.generate.text import Generation

LEVELS = (
    "levels=[{context: {chunk: 5, decay: 0.9, learning_rate: 0.3}},"
    "{period: 4, context: {chunk: 3, learning_rate: 0.3, blocks: 2}}]"
)
FORMS = ("model.mixer=hope", "model.mixer=attention", "model.cms=independent")
EXACT = 1e-11


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    run = tmp_path_factory.mktemp("run")
    saved(run, LEVELS, request.param)
    return nlscale.load(run, device="cpu", dtype=torch.float64)


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_pieces_rows_and_single_tokens_are_the_whole(model: Model) -> None:
    torch.manual_seed(3)
    draw, tokens = random.Random(3), random_tokens(3, 40)
    wanted = model.logits(tokens)
    stream, at, held = model.stream(3), [0] * 3, [0, 1, 2]
    for _ in range(40):
        n = draw.choice([1, 1, 1, 2, 7])
        lengths = [min(draw.randint(0, n), 40 - t) for t in at]
        given = torch.zeros(3, n, dtype=torch.long)
        for i, (row, t, length) in enumerate(zip(held, at, lengths, strict=True)):
            given[i, :length] = tokens[row, t : t + length]
        logits = stream.feed(given, lengths)
        for i, (row, t, length) in enumerate(zip(held, at, lengths, strict=True)):
            if length:
                assert far(logits[i, :length], wanted[row, t : t + length]) < EXACT
            at[i] += length
        if draw.random() < 0.2:
            order = draw.sample(range(3), 3)
            stream = stream.select(order)
            at, held = [at[i] for i in order], [held[i] for i in order]
        if draw.random() < 0.1:
            stream.reset([1])
            at[1] = 0
        if draw.random() < 0.2:
            stream = model.stream_from(stream.tensors())
    # what an evaluation reads, piece by piece or at once, and all rows alike
    one_by_one = model.stream(3)
    logits = [one_by_one.feed(piece) for piece in tokens.split([1] * 6 + [11, 1, 1, 21], dim=1)]
    assert far(torch.cat(logits, 1), wanted) < EXACT


def test_the_changes_count_and_other_tensors_are_refused(model: Model) -> None:
    torch.manual_seed(4)
    tokens = random_tokens(1, 30)
    begun = model.stream()
    begun.feed(tokens[:, :17])
    held = begun.tensors()
    without = {
        name: x * 0 if "context" in name and "change" in name else x for name, x in held.items()
    }
    ends = [model.stream_from(of).feed(tokens[:, 17:]) for of in (held, without)]
    assert far(ends[1], ends[0]) > 1e-4
    other = {name: x + 1 if name.endswith("1.position") else x for name, x in held.items()}
    with pytest.raises(UserError, match="not the tensors of a stream"):
        model.stream_from(other)


def test_a_text_goes_on_from_a_state_file(tmp_path: Path) -> None:
    saved(tmp_path / "run", LEVELS)
    model = nlscale.load(tmp_path / "run", device="cpu")
    model.tokenizer = SymbolTokenizer("letters", [f"s{i}" for i in range(VOCABULARY)])

    def through_a_file(path: Path, prompt: str, tokens: int) -> list[int]:
        begun = state_file.load(path, model) if path.exists() else None
        generation = Generation(model, [prompt], tokens, seed=9, begun=begun)
        list(generation.reading())
        list(generation.writing())
        state_file.save(path, generation.begun, model)
        return generation.results[0].ids

    at_once = through_a_file(tmp_path / "one.st", "s1 s2 s3", 14)
    parts = [("s1", 0), ("s2 s3", 0), ("", 1), ("", 6), ("", 7)]
    ids = [through_a_file(tmp_path / "parts.st", *part) for part in parts]
    assert [token for part in ids for token in part] == at_once and len(at_once) == 14


def test_it_has_no_class_of_hugging_face(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context: .*--to safetensors"):
        export_huggingface(saved(tmp_path, LEVELS), tmp_path / "out")
