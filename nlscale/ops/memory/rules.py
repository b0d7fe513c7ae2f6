"""What a memory is: its rules, what it has learned, and what it carries. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NORMALIZE_EPS = 1e-6
"""Added to the squared norm of k and v before the root."""
STATE_EPS = 1e-2
"""Added to the mean square of what is read off the state before the root: a state of next to
nothing, as at the start of a sequence, says next to nothing."""


@dataclass(frozen=True)
class MemoryRules:
    """What kind of memory it is; `nlscale.config.vocabulary.MemoryConfig` says more of each."""

    chunk: int
    anchored: bool
    c: float
    normalize_value: bool
    main_memory: bool
    """The main memory is a state of its own, S; otherwise it is read off Pi."""
    erases: bool = True
    """A write first erases what is stored along its key (the delta rule); else it only adds."""
    decayed_write: bool = False
    """A write erases what has decayed, alpha S (I - eta k k^T); else what has not,
    alpha S - eta (S k) k^T."""
    strength: float = 1.0
    """The most that a write strength may be: eta = strength * sigmoid(logit)."""
    reads_state: bool = False
    """What the queries read off S at the start of the chunk is part of k, v and the gates."""
    kalman_gain: bool = False
    """The write strength is a Kalman gain."""
    chunk_momentum: bool = False
    """What a chunk has written to S goes on, fading from chunk to chunk."""
    channel_gates: bool = False
    """Gates are vectors over channels: alpha and what a write erases over those of a key, what it
    writes over those of a value. Needs `decayed_write`."""

    @property
    def serial(self) -> bool:
        """Whether all of a chunk waits for the one before (`nlscale.ops.memory.serial`)."""
        return self.reads_state or self.kalman_gain or self.chunk_momentum or self.channel_gates


@dataclass
class MemoryWeights:
    """The learned initial memories of the heads; None for a static memory (`gated-delta`)."""

    key: Tensor
    """M_k, [heads, d, d]."""
    value: Tensor
    """M_v, [heads, d, d]."""
    gates: Tensor
    """m_eta and m_alpha, [heads, 2, d]; of gates of channels what makes the logits of b, of w and
    of alpha, [heads, 3 d, d]."""
    lambda_key: Tensor | None
    """Weight of the self-modified part of k, [heads]; None where there is no static part."""
    lambda_value: Tensor | None
    """Weight of the self-modified part of v, [heads]."""
    read: Tensor | None
    """M_m, [heads, d, d]; None where the main memory is a state of its own."""


@dataclass
class MainWeights:
    """What is learned of how the main memory S is written; None where the rules have it off."""

    state_key: Tensor | None = None
    """W_k of what is read off S at the start of a chunk, [heads, d, d]."""
    state_value: Tensor | None = None
    """W_v, likewise."""
    state_gates: Tensor | None = None
    """W of the logits of eta and alpha, [heads, 2, d]; of gates of channels [heads, 3 d, d]."""
    state_weight: Tensor | None = None
    """gamma, the weights of these three in k, v and the logits, [heads, 3]."""
    noise: Tensor | None = None
    """log omega of the Kalman gain, [heads]."""
    momentum_decay: Tensor | None = None
    """Logit of beta, what is left of the momentum after another chunk, [heads]."""
    momentum_weight: Tensor | None = None
    """gamma of it in S, [heads]."""


@dataclass
class MemoryState:
    """What is carried from one piece of the sequences to the next; memories in at least fp32."""

    start: Tensor | None
    """Pi at the start of the current chunk, [batch, heads, d, d]; None for a static memory."""
    current: Tensor
    """Pi and S now, stacked where there are both, [batch, heads, d or 2d, d]."""
    position: Tensor
    """Tokens of its current chunk that each row has written, int64 [batch], on the CPU."""
    main_start: Tensor | None = None
    """S at the start of the current chunk, [batch, heads, d, d]; where k, v and gates read it."""
    uncertainty: Tensor | None = None
    """p of the Kalman gain, [batch, heads]."""
    momentum: Tensor | None = None
    """m of the momentum over chunks, [batch, heads, d, d]."""
    since: Tensor | None = None
    """What was written to S since the chunk began, likewise, as it is now."""
