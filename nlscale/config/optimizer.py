"""The keys of `optimizer`: how gradients become updates (docs/concepts/optimizers.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

from nlscale.config.choices import ClipScope, NewtonSchulz, Schedule, UpdateScale
from nlscale.config.fields import one_of, within

RULES = ["adamw", "sgd", "muon", "m3", "delta", "deep"]
"""Names of the optimizer rules; what each is stands in `nlscale.optim.table`."""


@dataclass
class MatricesConfig:
    """What muon, m3, delta and deep have in common: updates of whole matrices, orthogonalised."""

    learning_rate: float = within(1.0, least=0)
    """Factor on the learning rate for the matrices; the rest, under adamw, has it as it is."""
    scale: UpdateScale = UpdateScale.adamw_rms
    """Size of an orthogonal update, [out, in]: adamw-rms 0.2 sqrt(max(out, in)), at which learning
    rates of adamw fit; keller sqrt(max(1, out / in)); spectral sqrt(out / in)."""
    coefficients: NewtonSchulz = NewtonSchulz.keller
    """Of the Newton-Schulz iteration: keller, or polar-express, which comes nearer to orthogonal.
    """
    iterations: int = within(5, above=0, most=20)
    """Newton-Schulz iterations."""


@dataclass
class MuonConfig:
    """M <- b M + (1 - b) G; the update is (1 - b) G + b M, orthogonalised (Jordan 2024)."""

    momentum: float = within(0.95, least=0, below=1)
    """b, per update."""


@dataclass
class M3Config:
    """Multi-scale momentum: a fast memory of gradients and a slow one (Algorithm 1 of the paper,
    with moving averages in place of sums, which grow without bound)."""

    momentum: float = within(0.95, least=0, below=1)
    """Decay of the fast memory, per update."""
    second_moment: float = within(0.95, least=0, below=1)
    """Decay of the second moment of the gradients, per update."""
    every: int = within(16, above=0)
    """Updates of the level between two of the slow memory."""
    slow_momentum: float = within(0.9, least=0, below=1)
    """Decay of the slow memory, per update of its own."""
    slow_weight: float = within(0.5, least=0)
    """Weight of the slow memory's orthogonalised direction beside the fast one's, 1."""


@dataclass
class DeltaConfig:
    """Momentum that forgets by the delta rule: M <- b M + (1 - b) G - eta M H^T H, H = G / |G|
    (Eq. 49 of the paper); then as muon."""

    momentum: float = within(0.95, least=0, below=1)
    """b, per update."""
    eta: float = within(0.5, above=0, most=1)
    """How much of what the memory holds along the rows of the gradient is forgotten."""


@dataclass
class DeepConfig:
    """Momentum that is read through a small network, m(u) = u + B s(A u), which learns which
    gradient follows on it (Eq. 50 of the paper; for research); then as muon."""

    momentum: float = within(0.95, least=0, below=1)
    """Decay of the momentum, per update."""
    inputs_per_rank: int = within(8, above=0)
    """Inputs of a matrix over hidden units of its network, of which there are at most half as many
    as outputs."""
    rate: float = within(0.01, least=0)
    """Norm of a step of the network over that which A begins with."""
    decay: float = within(0.99, above=0, most=1)
    """Of B, per update."""


@dataclass
class SgdConfig:
    """W <- W - lr (M + decay W), M <- b M + G."""

    momentum: float = within(0.0, least=0, below=1)
    """b, per update."""


@dataclass
class OptimizerConfig:
    """The rule that updates weights, sampled at each update of a level."""

    rule: str = one_of(RULES)
    """How a gradient becomes an update: adamw, sgd; or muon, m3, delta, deep of matrices, and adamw
    of the rest."""
    learning_rate: float = within(1e-3, above=0)
    """Peak learning rate."""
    min_learning_rate: float = within(0.1, least=0, most=1)
    """Final learning rate as a fraction of the peak."""
    schedule: Schedule = Schedule.cosine
    """cosine, or wsd: warm-up, stable, linear decay."""
    warmup_steps: int = within(100, least=0)
    """Steps of linear warm-up of the whole run."""
    warmup_updates: int = within(0, least=0)
    """Updates over which each level warms up beside that, linearly, counted in its own updates:
    a slow level makes its first ones when the run's warm-up is long over. 0: none."""
    decay_fraction: float = within(0.2, least=0, most=1)
    """Share of the steps that wsd spends decaying."""
    beta1: float = within(0.9, least=0, below=1)
    """Decay of adamw's first moment, per update."""
    beta2: float = within(0.95, least=0, below=1)
    """Decay of adamw's second moment, per update."""
    eps: float = within(1e-8, above=0)
    """Added to the root of adamw's second moment."""
    betas_by_period: bool = False
    """Whether memories of gradients last as many tokens at every period: a level of period C has
    beta^C in place of each beta and momentum, and decays as much a step as at period 1."""
    weight_decay: float = within(0.1, least=0)
    """Decoupled weight decay per update, on matrices; vectors and gains (norms) have none."""
    clip: float = within(1.0, least=0)
    """Largest norm of the window gradient; 0 switches clipping off."""
    clip_scope: ClipScope = ClipScope.level
    """level: each updating level by its own norm; joint: by the norm of all that update."""
    matrices: MatricesConfig = field(default_factory=MatricesConfig)
    """Matrices under muon, m3, delta and deep."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """muon."""
    m3: M3Config = field(default_factory=M3Config)
    """m3."""
    delta: DeltaConfig = field(default_factory=DeltaConfig)
    """delta."""
    deep: DeepConfig = field(default_factory=DeepConfig)
    """deep."""
    sgd: SgdConfig = field(default_factory=SgdConfig)
    """sgd."""
