"""The optimizer rules by name: the one place that knows which there are. No torch is imported.

A rule of this package takes its file, a line here, and its name in
`nlscale.config.vocabulary.RULES`. A package of your own calls `register` when it is imported; a
recipe names it in `run.imports`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nlscale.config.schema import nearest
from nlscale.config.vocabulary import RULES, OptimizerConfig
from nlscale.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer


_TAKEN = (
    "weights",
    "window",
    "error",
    "owner_error",
    "outer_weights",
    "outer_momentum",
    "local_weights",
)
"""Names of what checkpoints hold of a parameter under every rule."""
_TAKEN_BEFORE = "level_copy_"
"""Of those of copies, before the level."""


@dataclass(frozen=True)
class OnWhole:
    """A call of `nlscale.optim.matrices.Exchange.on_whole` that orthogonalises, for the plan."""

    given: int = 1
    """Arguments: as often each matrix goes to its owner."""
    results: int = 1
    """As often it comes back."""
    every: str | None = None
    """Key of `optimizer` that says every how many updates of a block; None: at each."""
    ranges: int = 2
    """fp32 values of each element of a rank's ranges that are held meanwhile, beside what is kept:
    gradients, what is given, and what calls before have returned."""
    beside: int = 0
    """Values of each element of the matrices of a shape that are held while Newton-Schulz runs,
    beside its argument."""


@dataclass(frozen=True)
class OnHost:
    """How a rule updates ranges in host memory, for levels of `update: cpu`."""

    made_by: str
    """`package.module:function`, imported when made, called with nothing. What it returns has
    `update(group, count, weights, gradient, kept)` like `nlscale.optim.cpu_adam.CpuAdam`."""
    operation: str
    """Of `nlscale.ops.compiled`, which must be there before a run starts."""

    def make(self) -> Any:
        """Imports torch."""
        module, _, name = self.made_by.partition(":")
        return getattr(importlib.import_module(module), name)()


@dataclass(frozen=True)
class Rule:
    """How a gradient becomes an update, and what that takes beside the weights."""

    made_by: str
    """`package.module:function`, imported when made. Called with the optimizer's configuration, the
    width multiplier of the model (`nlscale.model.width`) and a list of tagged parameters, it
    returns what megatron-core's DistributedOptimizer takes: a `torch.optim.AdamW` or a subclass
    with a `step` of its own. Each of its parameter groups has `lr_mult`, its factor on the learning
    rate; `step` changes nothing where `found_inf` is set; `state["step"]` counts updates. Under
    `betas_by_period` a rule whose level changes its period finds its numbers in `config` and in the
    `betas` of its groups, which are set before each update."""
    state: tuple[str, ...]
    """Names of what it keeps of each parameter: fp32, of the parameter's shape, sharded like it."""
    whole_matrices: bool = False
    """Whether an update of one element follows from the whole matrix. Then `made_by` makes a
    `nlscale.optim.matrices.MatrixRule`, and `state` is what that keeps of matrices; the rest is
    under `adamw`."""
    on_whole: tuple[OnWhole, ...] = (OnWhole(),)
    """The calls of an update, where it takes whole matrices."""
    on_host: OnHost | None = None
    """How it updates what lies in host memory, on the host; None: not at all."""

    def __post_init__(self) -> None:
        """Names are those of tensors in checkpoints, beside what is kept under every rule.

        Raises:
            UserError: a name that a checkpoint cannot hold.
        """
        if isinstance(self.state, str):
            raise UserError(f"an optimizer rule's state is a tuple of names, not {self.state!r}")
        for name in self.state:
            if name.startswith(_TAKEN_BEFORE) or name in _TAKEN or not name.isidentifier():
                raise UserError(f"an optimizer rule cannot call what it keeps {name!r}")

    @property
    def state_bytes(self) -> int:
        """Bytes that it keeps of each parameter that it takes."""
        return 4 * len(self.state)

    def of(self, matrix: bool) -> Rule:
        """The rule of a parameter: this, or, of what is no matrix, that of the rest."""
        return self if matrix or not self.whole_matrices else rule(REST)

    def make(
        self, config: OptimizerConfig, width_multiplier: float, parameters: list[Any]
    ) -> Optimizer:
        """The optimizer of some parameters; imports torch.

        Raises:
            UserError: it is none that megatron-core takes, or takes whole matrices without being a
                `MatrixRule`.
        """
        from torch.optim import AdamW

        module, _, name = self.made_by.partition(":")
        made = getattr(importlib.import_module(module), name)(config, width_multiplier, parameters)
        if not isinstance(made, AdamW):
            raise UserError(
                f"{self.made_by} returned {type(made).__name__}; megatron-core's sharded optimizer "
                f"takes a torch.optim.AdamW, or a subclass with a step of its own"
            )
        if self.whole_matrices:
            from nlscale.optim.matrices import MatrixRule

            if not isinstance(made, MatrixRule):
                raise UserError(
                    f"{self.made_by} returned {type(made).__name__}, and takes whole matrices; "
                    f"a rank holds ranges, which a subclass of MatrixRule of "
                    f"nlscale.optim.matrices makes whole"
                )
        return made


_TABLE: dict[str, Rule] = {
    "adamw": Rule(
        "nlscale.optim.adamw:adamw",
        state=("exp_avg", "exp_avg_sq"),
        on_host=OnHost("nlscale.optim.cpu_adam:CpuAdam", operation="cpu_adam"),
    ),
    "sgd": Rule("nlscale.optim.sgd:sgd", state=("momentum",)),
    "muon": Rule("nlscale.optim.muon:Muon", state=("momentum",), whole_matrices=True),
    "m3": Rule(
        "nlscale.optim.m3:M3",
        state=("momentum", "second_moment", "slow_momentum", "slow_direction"),
        whole_matrices=True,
        on_whole=(OnWhole(), OnWhole(every="m3.every", ranges=3)),
    ),
    "delta": Rule(
        "nlscale.optim.delta:Delta",
        state=("momentum",),
        whole_matrices=True,
        on_whole=(OnWhole(given=2, results=2, ranges=1, beside=5),),
    ),
    "deep": Rule(
        "nlscale.optim.deep:Deep",
        state=("momentum", "network"),
        whole_matrices=True,
        on_whole=(OnWhole(given=3, results=2, ranges=1, beside=5),),
    ),
}

REST = "adamw"
"""The rule of what is no matrix, where a rule takes whole matrices."""


def rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _TABLE:
        raise UserError(f"no optimizer rule is called {name!r}; {nearest(name, _TABLE)}")
    return _TABLE[name]


def register(name: str, new: Rule) -> None:
    """Add a rule, which `optimizer.rule` can name from then on.

    Raises:
        UserError: the name is taken.
    """
    if name in _TABLE:
        raise UserError(f"an optimizer rule is called {name!r} already; give yours another name")
    _TABLE[name] = new
    RULES.append(name)
