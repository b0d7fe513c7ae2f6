"""What a memory is: its rules, what it has learned, and what it carries. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NORMALIZE_EPS = 1e-6
"""Added to the squared norm of k and v before the root."""


@dataclass(frozen=True)
class MemoryRules:
    """What kind of memory it is; `nlscale.config.vocabulary.MemoryConfig` says more of each."""

    chunk: int
    anchored: bool
    c: float
    normalize_value: bool
    main_memory: bool
    """The main memory is a state of its own, S; otherwise it is read off Pi."""


@dataclass
class MemoryWeights:
    """The learned initial memories of the heads; None for a static memory (`gated-delta`)."""

    key: Tensor
    """M_k, [heads, d, d]."""
    value: Tensor
    """M_v, [heads, d, d]."""
    gates: Tensor
    """m_eta and m_alpha, [heads, 2, d]."""
    lambda_key: Tensor | None
    """Weight of the self-modified part of k, [heads]; None where there is no static part."""
    lambda_value: Tensor | None
    """Weight of the self-modified part of v, [heads]."""
    read: Tensor | None
    """M_m, [heads, d, d]; None where the main memory is a state of its own."""


@dataclass
class MemoryState:
    """What is carried from one piece of the sequences to the next; memories in at least fp32."""

    start: Tensor | None
    """Pi at the start of the current chunk, [batch, heads, d, d]; None for a static memory."""
    current: Tensor
    """Pi and S now, stacked where there are both, [batch, heads, d or 2d, d]."""
    position: Tensor
    """Tokens of its current chunk that each row has written, int64 [batch], on the CPU."""
