"""Whether the scan of a mixer with a memory is right on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nlscale.config.vocabulary import Config, ModelConfig, head_dim
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.ops.check import ScanInputs, errors_at_size

_HEADS = 2
"""That are not alike, of those that the check scans: the keys of one are."""
_CHUNKS = 64
"""Of a sequence, that float64 on a CPU core has done in a few seconds."""


def inputs_of(
    facts: MemoryFacts,
    model: ModelConfig,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    heads: int | None = None,
) -> ScanInputs:
    """Random ones of a mixer with a memory, for so many of its heads (None: all)."""
    memory = model.memory
    return ScanInputs(
        facts.rules(model),
        (batch, heads or model.heads, length, head_dim(model)),
        facts.modifies_itself,
        float(memory.lambda_init or 0.0),
        (float(memory.eta_bias or 0.0), memory.alpha_bias),
        dtype,
        device,
    )


def scan_errors(
    facts: MemoryFacts, config: Config, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Of the scan as a micro batch of the run launches it; none where no kernels take it."""
    model, rows = config.model, config.train.micro_batch
    heads = model.heads // config.parallel.tensor
    errors: dict[str, float] = {}
    for piece in pieces(config):
        inputs = inputs_of(facts, model, 1, piece.tokens, dtype, device, min(_HEADS, heads))
        if inputs.path == "torch":
            return {}
        inputs.make_keys_alike()
        carried = None
        if piece.documents:
            carried = torch.ones(1, -(-piece.tokens // model.memory.chunk))
            carried[:, ::3] = 0
        for name, error in errors_at_size(inputs, rows * piece.times, heads, carried).items():
            named = f"{name} of the memory scan"
            errors[named] = max(error, errors.get(named, 0.0))
    return errors


@dataclass(frozen=True)
class Piece:
    """Of a sequence, that one launch of each kernel takes."""

    tokens: int
    times: int = 1
    """As many sequences as the micro batch has are made of one that is too long to check."""
    documents: bool = False


def pieces(config: Config) -> list[Piece]:
    """What the scan of a run is launched for: the whole chunks of its sequences, and what is left.

    Where documents are told apart, each is filled up to whole chunks, of which there is another
    number at every step. Triton compiles a kernel for the numbers that are multiples of 16, another
    one for those that are not, and one for 1 of them: the first of each kind.
    """
    chunk, length = config.model.memory.chunk, config.data.sequence_length
    whole, rest = divmod(length, chunk)
    if config.data.document_mask:
        least = -(-length // chunk)
        kinds = {_kind(n): n for n in reversed(range(least, min(length, least + 16) + 1))}
        return [Piece(*_cut(n, chunk), documents=True) for n in sorted(kinds.values())]
    found = [Piece(*_cut(whole, chunk))] if whole else []
    return found + ([Piece(rest)] if rest else [])


def _cut(chunks: int, chunk: int) -> tuple[int, int]:
    """Tokens and number of the equal parts of so many chunks, each of the same kind as the whole.

    All of them where that is few enough, or where there are no such parts.
    """
    part = next(
        (
            n
            for n in range(min(chunks, _CHUNKS), 7, -1)
            if chunks % n == 0 and _kind(n) == _kind(chunks)
        ),
        chunks,
    )
    return part * chunk, chunks // part


def _kind(number: int) -> int:
    """By which Triton compiles one kernel or another for an integer argument."""
    return 16 if number % 16 == 0 else min(number, 2)
