"""What is drawn, held against another implementation and against computed probabilities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as theirs

from nlscale.errors import UserError
from nlscale.generate.sampling import (
    Sampling,
    check_seed,
    chosen,
    drawn,
    filtered,
    number,
    penalized,
)

ALL = Sampling(temperature=1.0, top_p=1.0)


def logits_of(rows: int, vocabulary: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, dtype=torch.float64)


def same(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to a constant a row, and the same tokens left."""
    left = torch.equal(ours.isfinite(), other.isfinite())
    return left and torch.allclose(ours.softmax(-1), other.softmax(-1), atol=1e-14)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_filters_leave_what_those_of_transformers_leave(temperature: float) -> None:
    counts = set()
    for k, p, low in itertools.product([0, 1, 7, 50, 999], [1.0, 0.9, 0.3, 1e-6], [0.0, 0.02, 1.0]):
        logits = logits_of(8, 50)
        other: Any = theirs.TemperatureLogitsWarper(temperature)(None, logits)
        if k:
            other = theirs.TopKLogitsWarper(k)(None, other)
        if p < 1:
            other = theirs.TopPLogitsWarper(p)(None, other)
        if low:
            other = theirs.MinPLogitsWarper(low)(None, other)
        ours = filtered(logits, Sampling(temperature, k, p, low))
        assert same(ours, other), (k, p, low)
        counts.add(int(ours.isfinite().sum()))
    assert {8, 400} < counts, "they keep one token, all, and some"


def test_the_penalty_is_that_of_transformers() -> None:
    logits, ids = logits_of(4, 30), torch.randint(30, (4, 12))
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.7, 1.0, 1.3):
        other = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalized(logits, seen, penalty), other)
    tokens, _ = chosen(logits, seen, Sampling(temperature=0, repetition_penalty=1e6), [0.0] * 4)
    assert not seen.gather(1, tokens[:, None]).any()


def test_tokens_come_as_often_as_computed() -> None:
    """Of n draws a token of probability p comes n p times, give or take sqrt(n p (1 - p)): within
    five of these for each of the 24 that can come, which chance passes 1.4e-5 of the time."""
    draws = 20_000
    numbers = [number(7, 1, place) for place in range(draws)]
    for sampling in (ALL, Sampling(0.7, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.5)):
        logits, seen = logits_of(1, 24, scale=1.0), torch.arange(24)[None] % 5 == 0
        # from the definitions, one token after the other
        scores = logits[0].tolist()
        for i in range(0, 24, 5):
            scores[i] *= sampling.repetition_penalty ** (1 if scores[i] < 0 else -1)
        chances = [math.exp(x / sampling.temperature) for x in scores]
        order = sorted(range(24), key=lambda i: -chances[i])[: sampling.top_k or 24]
        total, kept, mass = sum(chances[i] for i in order), [], 0.0
        for i in order:
            if mass < sampling.top_p * total and chances[i] >= sampling.min_p * chances[order[0]]:
                kept.append(i)
            mass += chances[i]
        total = sum(chances[i] for i in kept)
        rows = (t.expand(draws, -1) for t in (logits, seen))
        counts = torch.bincount(chosen(*rows, sampling, numbers)[0], minlength=24).tolist()
        assert 3 < len(kept) <= 24
        for i in range(24):
            p = chances[i] / total if i in kept else 0.0
            assert abs(counts[i] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)), (sampling, i)


def test_numbers_are_uniform_and_those_of_their_place() -> None:
    n = 4000
    for key in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 5)):
        numbers = sorted(number(*key, place) for place in range(n))
        # Kolmogorov-Smirnov: more than 1.95 / sqrt(n) once in a thousand
        assert max(abs(x - i / n) for i, x in enumerate(numbers)) < 1.95 / math.sqrt(n)
        assert numbers[0] >= 0 and numbers[-1] < 1
    few = {number(s, i, j) for s in range(8) for i in range(8) for j in range(8)}
    assert len(few) == 8**3
    # Texts of a seed are to be the same in every version.
    assert number(0, 0, 0) == 0.011546754286331562
    assert number(2**64 - 1, 3, 10**6) == 0.40932857155479274


def test_the_ends_of_the_cumulative_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 3).double()
    assert drawn(logits, [0.0, 0.5, 1 - 2**-53]).tolist() == [1, 2, 2]
    tiny = torch.tensor([[0.0, -math.inf, -800.0, -math.inf]]).double()
    assert drawn(tiny, [1 - 2**-53]).tolist() in ([0], [2])


def test_cold_is_greedy_and_what_is_said_of_it_is_of_the_model() -> None:
    logits = logits_of(16, 40)
    seen, numbers = torch.zeros_like(logits).bool(), [i / 16 for i in range(16)]
    expected = logits.log_softmax(-1)
    for temperature in (0.0, 1e-300, 1e-4):
        tokens, said = chosen(logits.float(), seen, Sampling(temperature), numbers)
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.allclose(said, expected.amax(-1), atol=1e-5)
    tokens, said = chosen(logits, seen, Sampling(3.0, top_k=5), numbers)
    assert torch.allclose(said, expected.gather(1, tokens[:, None])[:, 0])
    assert not torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0 or above"),
        ({"temperature": math.inf}, "temperature=inf must be"),
        ({"top_k": -1}, "top_k=-1 must be a whole number"),
        ({"top_k": 5.0}, "top_k=5.0 must be a whole number"),
        ({"top_k": math.inf}, "top_k=inf must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot' must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p=1.5 must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Sampling(**wrong)


def test_logits_that_are_not_finite_and_seeds_that_are_none_are_refused() -> None:
    logits = logits_of(2, 5)
    logits[1, 3] = math.nan
    with pytest.raises(UserError, match="not finite: its training has diverged"):
        chosen(logits, torch.zeros(2, 5).bool(), ALL, [0.1, 0.2])
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match="seed="):
            check_seed(seed)
