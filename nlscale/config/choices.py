"""What keys may be that name one of a few ways, each with what it means."""

from __future__ import annotations

from enum import Enum


class CmsForm(str, Enum):
    """How the MLPs of a CMS block are composed (Eq. 70-73)."""

    sequential = "sequential"
    independent = "independent"
    nested = "nested"
    """One MLP, and copies of it that change more slowly and from which it sets out again."""


class Phases(str, Enum):
    """Which block has which of the phases that `levels.stagger` gives a slow level's blocks."""

    by_depth = "by_depth"
    """The first block the first phase, the last block the last."""
    interleaved = "interleaved"
    """Blocks beside each other have phases far apart, so that the blocks of a pipeline stage spread
    theirs over the period."""


class GateActivation(str, Enum):
    """What a memory's output gate makes of its logits."""

    silu = "silu"
    sigmoid = "sigmoid"


class MemoryWrite(str, Enum):
    """What a write erases along its key k, with the strength eta and the decay alpha."""

    undecayed = "undecayed"
    """State as it was: alpha S - eta (S k) k^T, of which alpha - eta is left along k."""
    decayed = "decayed"
    """State that has decayed, as published (Gated DeltaNet): alpha S (I - eta k k^T)."""


class MemoryGates(str, Enum):
    """What the decay and the write strength of a memory are numbers of."""

    head = "head"
    """One each a head."""
    channel = "channel"
    """Vectors: of the decay and of what a write erases over the channels of a key, of what it
    writes over those of a value."""


class MemoryGain(str, Enum):
    """What decides how strongly a memory writes."""

    learned = "learned"
    """A logit alone."""
    kalman = "kalman"
    """A logit, and how uncertain the memory is by then."""


class Decay(str, Enum):
    """What a memory forgets from token to token."""

    learned = "learned"
    """A share that follows from the token, a number a head."""
    fixed = "fixed"
    """1 - alpha = 2^(-5 - head), as in RetNet."""
    none = "none"
    """Nothing: alpha = 1."""


class Dtype(str, Enum):
    """Precision of parameters and activations; optimizer state is always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(str, Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    wsd = "wsd"


class PeriodRule(str, Enum):
    """How a level's learning rate grows with its period C: not at all, sqrt(C) or C."""

    none = "none"
    sqrt = "sqrt"
    linear = "linear"


class ClipScope(str, Enum):
    """Whose norm is clipped: each updating level by itself, or all that update jointly."""

    level = "level"
    joint = "joint"


class Reduction(str, Enum):
    """When a window crosses the network: once, when due, or (for comparison) at every step."""

    deferred = "deferred"
    every_step = "every-step"


class WireFormat(str, Enum):
    """How gradients cross between nodes."""

    fp32 = "fp32"
    """As they are."""
    bf16 = "bf16"
    """Each node's part, and then the sum, rounded to half the bytes."""
    int8 = "int8"
    """The same as integers of 8 bits; what rounding leaves is kept and sent with the next sums."""
    int4 = "int4"
    """The same in 4 bits."""


class ContextObjective(str, Enum):
    """What a level learns by while a sequence is read (docs/concepts/context.md)."""

    local = "local"
    """Outer products of its own hidden units with a learned target, which training learns through.
    """
    ntp = "ntp"
    """The gradient of the loss of the next tokens, first order, when a trained model is evaluated.
    """


class ContextReset(str, Enum):
    """When what a level has learned in the context is forgotten."""

    sequence = "sequence"
    never = "never"


class Tier(str, Enum):
    """The memory in which what updates a level lies between its updates."""

    hbm = "hbm"
    """The GPU's."""
    host = "host"
    """The node's; an update streams it through the GPU."""
    nvme = "nvme"
    """A drive of the node; read ahead before an update, and written back behind it."""


class Updater(str, Enum):
    """What updates a level whose state lies in host memory."""

    device = "device"
    """The GPU, through which the state is streamed: the bits are those of hbm."""
    cpu = "cpu"
    """The host, by DeepSpeed's cpu_adam: gradients go to it and weights come back. Within 1e-6."""


class Part(str, Enum):
    """A part of the model, which belongs to a level (docs/concepts/levels.md)."""

    cms = "cms"
    """The level's own MLP in each block."""
    mixer = "mixer"
    """The mixer of each block."""
    embedding = "embedding"
    """The matrix that makes tokens vectors; where it is tied, the head too."""
    head = "head"
    """The matrix that makes vectors logits."""
    norms = "norms"
    """The norms of the residual stream: before each mixer and MLP, and the last."""


class Purpose(str, Enum):
    """What a run is for."""

    result = "result"
    """To be looked at for itself."""
    search = "search"
    """To choose a setting among several."""


class Sharding(str, Enum):
    """Over which of the ranks that hold the same parameters their optimizer state is spread."""

    node = "node"
    """Those of a node; every node has all of it."""
    all = "all"
    """Those of all nodes."""
    matrices = "matrices"
    """The same, each matrix of a rule over whole ones with those of one node."""


class Pending(str, Enum):
    """How a checkpoint holds the windows of slow levels that are not full."""

    canonical = "canonical"
    """Summed over the nodes: loads on any layout. Costs one reduction of the pending groups."""
    exact = "exact"
    """Each node's own sums: the run is not touched, but only the same layout can load it."""


class Recompute(str, Enum):
    """A part of a block whose activations are computed again in the backward pass."""

    mixer = "mixer"
    """The memory scan, or softmax attention, from its projected inputs."""
    cms = "cms"
    """The hidden units of every CMS MLP, from the normalised residual stream."""


class UpdateScale(str, Enum):
    """Size of an orthogonalised update of a matrix [out, in]."""

    adamw_rms = "adamw-rms"
    """0.2 sqrt(max(out, in)): entries of the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).
    """
    keller = "keller"
    """sqrt(max(1, out / in)) (Jordan 2024)."""
    spectral = "spectral"
    """sqrt(out / in): muP of matrices (Yang et al. 2023, arXiv 2310.17813)."""


class NewtonSchulz(str, Enum):
    """Coefficients of the iteration that orthogonalises."""

    keller = "keller"
    """The same at each step; singular values end between 0.7 and 1.2 (Jordan 2024)."""
    polar_express = "polar-express"
    """Of each step its own, the best there are for it (Amsel et al. 2025, arXiv 2505.16932)."""
