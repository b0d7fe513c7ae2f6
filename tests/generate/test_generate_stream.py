"""A model that reads piece by piece says what it says when it reads at once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generate.models import PATHS, VOCABULARY, random_tokens, saved

import nlscale
from nlscale.errors import UserError
from nlscale.generate.model import Model

CHUNK = 4  # of the models' memories
DTYPES = {torch.float64: 1e-12, torch.float32: 5e-5}
"""Largest |difference| / |largest logit|. Pieces sum in another order, and nothing else differs:
what is left shrinks with the precision. Seen over fifty random cuts: 3e-14 and 7e-6."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    run = tmp_path_factory.mktemp("run")
    saved(run)
    return nlscale.load(run, device="cpu")


def cuts(length: int) -> list[int]:
    """Sizes of pieces that end anywhere in a chunk, single tokens and several chunks among them."""
    sizes = [1, 1, random.randint(2, CHUNK - 1), CHUNK, random.randint(2 * CHUNK, 4 * CHUNK)]
    while sum(sizes) < length:
        sizes.append(random.randint(1, min(9, length - sum(sizes))))
    random.shuffle(sizes)
    return sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixer", PATHS)
def test_pieces_give_what_the_whole_gives(mixer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, f"model.mixer={mixer}")
    model = nlscale.load(tmp_path, device="cpu", dtype=dtype)
    tokens = random_tokens(3, 53)
    whole = model.logits(tokens)
    assert whole.shape == (3, 53, VOCABULARY) and whole.dtype == dtype
    scale = float(whole.abs().max())
    for _ in range(4):
        sizes = cuts(53)
        stream = model.stream(batch=3)
        pieces = [stream.feed(piece) for piece in tokens.split(sizes, dim=1)]
        assert [piece.shape[1] for piece in pieces] == sizes
        worst = float((torch.cat(pieces, dim=1) - whole).abs().max())
        assert worst <= DTYPES[dtype] * scale, sizes
    anew = model.logits(tokens[:, -sizes[-1] :])
    assert float((anew - pieces[-1]).abs().max()) > 1e-2 * scale, "what came before has no say"


def test_a_trained_model_in_bf16_answers_in_fp32(tmp_path: Path) -> None:
    saved(tmp_path, "train.dtype=bf16")
    model, wide = (nlscale.load(tmp_path, device="cpu", dtype=d) for d in (None, torch.float64))
    assert model.dtype == torch.bfloat16
    tokens = random_tokens(2, 11)
    logits, exact = model.logits(tokens), wide.logits(tokens)
    assert logits.dtype == torch.float32
    # Rounding to bf16 (2^-9), which a memory amplifies where keys are nearly alike: 0.016 to 0.093
    # over 150 drawn texts. Logits that have nothing to do with each other are 1.4 apart.
    assert 1e-4 < float((logits - exact).norm() / exact.norm()) < 0.4


def test_a_clone_goes_its_own_way(model: Model) -> None:
    tokens, others = random_tokens(2, 10), random_tokens(2, 7)
    stream = model.stream(batch=2)
    stream.feed(tokens[:, :6])
    clone = stream.clone()
    clone.feed(others)
    whole = model.logits(tokens)
    assert torch.allclose(stream.feed(tokens[:, 6:]), whole[:, 6:], atol=1e-5)
    assert torch.allclose(clone.feed(tokens), model.logits(torch.cat(
        [tokens[:, :6], others, tokens], dim=1
    ))[:, 13:], atol=1e-5)  # fmt: skip


def test_the_loss_is_that_of_the_next_token(model: Model) -> None:
    tokens = random_tokens(3, 19)
    logits = model.logits(tokens)[:, :-1].reshape(-1, VOCABULARY)
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten())
    assert model.loss(tokens) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("form", [np.uint8, np.uint16, np.int32, list])
def test_tokens_may_be_arrays_and_lists(model: Model, form: Any) -> None:
    tokens = random_tokens(2, 5)
    given = tokens.tolist() if form is list else tokens.numpy().astype(form)
    assert torch.equal(model.logits(given), model.logits(tokens))


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2, 3], r"shape \(3,\); give \[batch, n\]"),
        (torch.zeros(2, 0, dtype=torch.long), r"shape \(2, 0\)"),
        ([[0.5, 1.0]], "float64 are no ids"),
        (torch.zeros(1, 2), r"torch\.float32 are no ids"),
        ([[0, VOCABULARY]], f"from 0 to {VOCABULARY}, and the model knows 0 to {VOCABULARY - 1}"),
        ([[-1, 3]], "from -1 to 3"),
        ([[1], [2]], r"2 sequences are fed to a stream of 1; .*batch=2"),
    ],
)
def test_what_are_no_tokens_of_the_model_is_refused(model: Model, tokens: Any, says: str) -> None:
    stream = model.stream()
    with pytest.raises(UserError, match=says):
        stream.feed(tokens)
    assert torch.equal(stream.feed([[1, 2]]), model.logits([[1, 2]])), "it was not touched"


def test_no_loss_of_one_token(model: Model) -> None:
    with pytest.raises(UserError, match="2 tokens a row"):
        model.loss([[1], [2]])
