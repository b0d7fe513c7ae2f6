"""How fast a model of some size reads a context and goes on from it token by token.

Weights are random, drawn as a run draws them: neither speed nor what is carried depends on them.
On a GPU the tokens of a memory are replayed from a CUDA graph after the first
`nlscale.model.graph.AFTER`; before, and with attention, a small batch is as fast as its launches.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlscale.bench.clock import here, median_seconds, name_of, now
from nlscale.bench.progress import each
from nlscale.config.vocabulary import Config, ParallelConfig, mixer_label
from nlscale.errors import UserError
from nlscale.generate.model import Model
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.alone import alone

_WARM_UP = 3
"""Tokens before the first that counts."""
_WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
_SLACK = 2
"""How many times the rounding of reading at once, measured beside it, the two ways may differ: each
is off by as much. Seen in bf16 and fp32, with 4 and 24 layers of each mixer: up to 1.15 times; of a
stream that forgets what came before: 4.8 times and more."""


def bench_decoding(
    configs: list[Config],
    contexts: Sequence[int],
    new_tokens: int,
    batches: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Time reading a context at once, then tokens one by one, and compare both ways.

    On one device, whatever the `parallel` section says.

    Args:
        configs: which differ in their mixer, with `model.vocabulary` set.
        contexts: tokens that are read before the first new one.
        new_tokens: to decode one by one and time.
        batches: sequences at a time.
        repeats: of reading a context.

    Returns:
        `device`, `dtype`, `torch`, `new_tokens`, `repeats`, `ok` (of all rows), and `rows`, one for
        each mixer, batch and context:
        - `mixer`, `parameters`, `batch`, `context`
        - `prefill_seconds`: median, of the whole context at once and the logits of its last token;
          `prefill_tokens_per_second`, of all sequences
        - `token_ms`, `token_ms_p95`: median and 95th percentile of the time from feeding a token
          of each sequence to having chosen the next; `tokens_per_second` at the median, of all
          sequences
        - `launch_share`: of that time, the part until the host has asked the device for all of it,
          median; near 1, the device waits for launches, and CUDA graphs would help. Null on a CPU
        - `state_bytes`: that a sequence carries after the last token
        - `peak_memory_bytes`: weights, state and all else, null on a CPU
        - `difference`: of the logits of the new tokens, decoded one by one and read at once: the
          largest |difference| / |logits| of a token, by norm; whether it is `ok`, within `bound`:
          twice as far as those read at once are from the same weights in fp32, or, of fp32, in
          float64, after the shortest context. Logits that have nothing in common are 1.4 apart

    Raises:
        UserError: `model.vocabulary` is not set, or a size is less than 1.
    """
    if any(config.model.vocabulary is None for config in configs):
        raise UserError("bench decode reads no data: give model.vocabulary=256, for example")
    if min([new_tokens, repeats, *contexts, *batches]) < 1:
        raise UserError("contexts, batches, new tokens and repeats of bench decode are 1 or more")
    device, rows = here(), []
    for config in each("decode", configs, lambda config: mixer_label(config.model)):
        decoder = _decoder(config, device)
        with alone():
            initialize(decoder, config.run.seed, 0, 1)
        bound = _SLACK * _rounding(decoder, config, min(contexts), new_tokens)
        for batch in batches:
            for context in contexts:
                row = _measure(decoder, config, batch, context, new_tokens, repeats)
                agrees = {"bound": bound, "ok": row["difference"] <= bound}
                rows.append({"mixer": mixer_label(config.model), **row, **agrees})
        del decoder  # before the next one is made
    return {
        "device": name_of(device),
        "dtype": configs[0].train.dtype.value,
        "torch": torch.__version__,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "ok": all(row["ok"] for row in rows),
        "rows": rows,
    }


def _decoder(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> Decoder:
    """The whole model, in `train.dtype` unless one is given, whose weights are yet to be set."""
    config = copy.deepcopy(config)
    config.parallel = ParallelConfig()
    assert config.model.vocabulary is not None
    with alone():
        decoder = Decoder(config, megatron_config(config), config.model.vocabulary)
    return decoder.to(device=device, dtype=dtype)


def _tokens(config: Config, batch: int, count: int, device: torch.device) -> Tensor:
    """Random ids [batch, count]."""
    generator = torch.Generator().manual_seed(config.run.seed)
    assert config.model.vocabulary is not None
    return torch.randint(config.model.vocabulary, (batch, count), generator=generator).to(device)


def _rounding(decoder: Decoder, config: Config, context: int, new_tokens: int) -> float:
    """How far the logits of new tokens, read at once, are from those of a wider dtype."""
    weight = next(decoder.parameters())
    exact = _decoder(config, weight.device, _WIDER[weight.dtype])
    exact.load_state_dict(decoder.state_dict())
    rows = _tokens(config, 1, context + _WARM_UP + new_tokens, weight.device)
    found, wanted = (read(model, rows, _WARM_UP + new_tokens) for model in (decoder, exact))
    return largest_difference(found, wanted)


def _measure(
    decoder: Decoder, config: Config, batch: int, context: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    """All of a row but its mixer and what it may differ by."""
    model = Model(decoder, config, step=0)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    rows = _tokens(config, batch, context + _WARM_UP + new_tokens, model.device)
    given, new = rows[:, :context], rows[:, context:]

    prefill = median_seconds(model.device, repeats, lambda _: read(decoder, given))
    stream = model.stream(batch)
    stream.feed(given, last=True)
    decoded, seconds, asked = [], [], []
    for token in new.split(1, dim=1):
        began = now(model.device)
        logits = stream.feed(token)
        # What is fed is random all the same: what a model at its start repeats says little.
        logits.argmax(dim=-1)
        launched = time.perf_counter()
        ended = now(model.device)
        decoded.append(logits)
        seconds.append(ended - began)
        asked.append((launched - began) / (ended - began))
    token_seconds, shares = np.array(seconds[_WARM_UP:]), asked[_WARM_UP:]
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
    difference = largest_difference(torch.cat(decoded, dim=1), read(decoder, rows, new.shape[1]))
    median = float(np.median(token_seconds))
    return {
        "parameters": sum(p.numel() for p in decoder.parameters()),
        "batch": batch,
        "context": context,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": batch * context / prefill,
        "token_ms": 1e3 * median,
        "token_ms_p95": 1e3 * float(np.percentile(token_seconds, 95)),
        "tokens_per_second": batch / median,
        "launch_share": statistics.median(shares) if on_gpu else None,
        "state_bytes": stream.nbytes // batch,
        "peak_memory_bytes": peak,
        "difference": difference,
    }


def read(decoder: Decoder, tokens: Tensor, last: int = 1) -> Tensor:
    """Logits [batch, last, vocabulary] of the last tokens of [batch, n], read at once.

    `Stream.feed` would make those of all tokens, which of a long context take more memory than the
    model does.
    """
    with alone(), torch.no_grad():
        x, _ = decoder.hidden(tokens)
        return decoder.logits(x[-last:]).transpose(0, 1)


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Of the tokens of two [batch, n, vocabulary], the largest |found - wanted| / |wanted|."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
