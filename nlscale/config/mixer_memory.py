"""The section `model.memory`: a mixer with a memory."""

from __future__ import annotations

from dataclasses import dataclass

from nlscale.config.choices import GateActivation, MemoryGain, MemoryGates, MemoryWrite
from nlscale.config.fields import MOST, within


@dataclass
class MemoryConfig:
    """The self-modifying memory of the mixer. Null means: as `model.mixer` says."""

    chunk: int = within(64, above=0, most=MOST)
    """Tokens between two self-modifications; it is part of the model, not only of its speed."""
    convolution: int = within(4, above=0, most=MOST)
    """Window of the causal depthwise convolution before the memory, in tokens."""
    lambda_init: float | None = within(None)
    """Initial weight of the self-modified part of k and v, per head (hope: 0.3)."""
    anchored: bool | None = None
    """Decay toward the learned initial memory instead of toward zero."""
    c: float | None = within(None, least=0, most=1)
    """1: the paper's delta gradient descent; 0: the plain delta rule."""
    normalize_value: bool | None = None
    """L2-normalise v in the update of the memories that make k, v and the gates."""
    separate_inputs: bool | None = None
    """Separate projections of x for what feeds k and what feeds v."""
    static_gates: bool | None = None
    """Add a linear of x to the self-modifying gate logits."""
    query_convolution: bool = False
    """The convolution and its SiLU before the queries too, as before what feeds k and v."""
    write: MemoryWrite = MemoryWrite.undecayed
    """What a write erases along its key: undecayed, alpha S - eta (S k) k^T; or decayed, the
    published alpha S (I - eta k k^T)."""
    strength: int = within(1, least=1, most=2)
    """The most that a write strength may be, strength x sigmoid(logit): 1, or 2, where a write may
    turn the state along its key around (negative eigenvalues); 2 needs write: decayed."""
    gates: MemoryGates = MemoryGates.head
    """What decay and write strength are numbers of: head, one each; or channel, vectors, of the
    decay and of what a write erases over the channels of a key, of what it writes over those of a
    value; channel needs write: decayed."""
    gain: MemoryGain = MemoryGain.learned
    """The write strength: learned, a logit alone; or kalman, the gain of a filter that keeps
    account, a head, of how uncertain the memory is."""
    reads_state: bool = False
    """Self-modification that reads the main memory: what the queries read off it at the start of
    the chunk is added to k, v and the gates, by a learned weight that begins at 0."""
    chunk_momentum: bool = False
    """What a chunk has written to the main memory goes on at the end of each chunk, fading, by a
    learned weight that begins at 0."""
    output_gate: bool | None = None
    """Multiply the read by an activation of a linear of x."""
    gate_activation: GateActivation = GateActivation.silu
    """That activation: silu or sigmoid."""
    read_norm: bool | None = None
    """RMS-normalise the read of each head."""
    eta_bias: float | None = within(None)
    """Initial bias of the write-strength logit (hope: 0; c = 1 needs about -2)."""
    alpha_bias: float = within(4.0)
    """Initial bias of the decay logit, the middle of a spread of 1 over the heads."""
