"""How the next token is chosen from logits: pure functions on the CPU, in float64.

The random numbers are counter-based: each is a function of a seed, a sample and a place in the
sequence, and of nothing else, so that what is drawn for one sequence does not depend on those
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from nlscale.errors import UserError
from nlscale.generate.tokens import is_whole

_SEEDS = 1 << 64
_ABOVE_0 = math.ulp(0.0)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The penalty comes first, then what follows in its order here.

    Attributes:
        repetition_penalty: of CTRL: logits of tokens that are in the sequence, the prompt included,
            are divided by it where they are positive and multiplied where negative; 1 is none
        temperature: logits are divided by it; 0 takes the most likely token, and no filter matters
        top_k: keeps the k most likely tokens, and those as likely as the last of them; 0 keeps all
        top_p: keeps the fewest most likely tokens whose probabilities add up to it; 1 keeps all
        min_p: keeps tokens of at least this part of the probability of the most likely; 0 keeps all
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, least, most, wanted in (
            ("temperature", 0, math.inf, "0 or above"),
            ("top_k", 0, math.inf, "a whole number, 0 or above"),
            ("top_p", _ABOVE_0, 1, "above 0 and at most 1"),
            ("min_p", 0, 1, "from 0 to 1"),
            ("repetition_penalty", _ABOVE_0, math.inf, "above 0"),
        ):
            value = getattr(self, name)
            is_number = is_whole(value) if name == "top_k" else isinstance(value, Real)
            if not is_number or not math.isfinite(value) or not least <= value <= most:
                raise UserError(f"{name}={value!r} must be {wanted}")


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits with those of tokens that were seen made less likely.

    Args:
        logits: [rows, vocabulary].
        seen: bool [rows, vocabulary].
        penalty: above 0; 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits over the temperature, -inf where a token is not to be drawn.

    Each filter works on what the one before has left. One token of each row at least is kept.

    Args:
        logits: [rows, vocabulary], finite.
        sampling: its temperature above 0.
    """
    # From the largest, so that a tiny temperature gives -inf for the others and never inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1, stable=True)
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        gone[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits


def drawn(logits: Tensor, numbers: Sequence[float]) -> Tensor:
    """The tokens at which the cumulative probability passes the numbers: int64 [rows].

    Args:
        logits: [rows, vocabulary]; -inf is never drawn.
        numbers: one a row, from 0 to below 1.
    """
    sums = logits.softmax(-1).cumsum(-1)
    passed = sums > torch.tensor(numbers, dtype=sums.dtype)[:, None] * sums[:, -1:]
    # The product may round up to the sum of all: then the last that can be drawn.
    last = logits.shape[-1] - 1 - logits.isfinite().int().flip(-1).argmax(-1)
    return torch.where(passed.any(-1), passed.int().argmax(-1), last)


def number(seed: int, sample: int, place: int) -> float:
    """The random number of a place: uniform in [0, 1), a multiple of 2^-53.

    The first word of Philox (4x64, 10 rounds) under the key (seed, sample) at the counter `place`.

    Args:
        seed: 0 to 2^64 - 1.
        sample: 0 to 2^64 - 1.
        place: of the token in its sequence, 0 or above.
    """
    key = np.array([seed, sample], dtype=np.uint64)
    word = np.random.Philox(key=key, counter=[place, 0, 0, 0]).random_raw()
    return (int(word) >> 11) * 2.0**-53


def chosen(
    logits: Tensor, seen: Tensor, sampling: Sampling, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The next token of each row, and how likely the model held it.

    Args:
        logits: [rows, vocabulary] of the model, of any dtype and device.
        seen: bool [rows, n], on the CPU: which of the first n ids occur; the others are not drawn.
        sampling: of all rows.
        numbers: one a row, from 0 to below 1; not used at temperature 0.

    Returns:
        int64 [rows], and float64 [rows]: log p(token) of the model itself, in nats, over the whole
        vocabulary, before penalty, temperature and filters.

    Raises:
        UserError: a logit is not finite.
    """
    logits = logits.to("cpu", torch.float64)
    if not logits.isfinite().all():
        raise UserError(
            "the model gives logits that are not finite: its training has diverged, or its weights "
            "are damaged; `nlscale checkpoint verify` tells, and an older checkpoint may do"
        )
    shaped = penalized(logits[:, : seen.shape[1]], seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        tokens = shaped.argmax(-1)
    else:
        tokens = drawn(filtered(shaped, sampling), numbers)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def check_seed(seed: int) -> None:
    """Raises UserError: it is none that `number` takes."""
    if not is_whole(seed) or not 0 <= seed < _SEEDS:
        raise UserError(f"seed={seed!r} must be a whole number from 0 to 2^64 - 1")
