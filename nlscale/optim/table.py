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


@dataclass(frozen=True)
class Rule:
    """How a gradient becomes an update, and what that takes beside the weights."""

    made_by: str
    """`package.module:function`, imported when made. Called with the optimizer's configuration, the
    width multiplier of the model (`nlscale.model.width`) and a list of tagged parameters, it
    returns what megatron-core's DistributedOptimizer takes: a `torch.optim.AdamW` or a subclass
    with a `step` of its own. Each of its parameter groups has `lr_mult`, its factor on the learning
    rate; `step` changes nothing where `found_inf` is set; `state["step"]` counts updates."""
    state: tuple[str, ...]
    """Names of what it keeps of each parameter: fp32, of the parameter's shape, sharded like it."""
    whole_matrices: bool = False
    """Whether an update of one element follows from the whole matrix, not from that element."""

    def __post_init__(self) -> None:
        """Names are those of tensors in checkpoints, beside `weights` and `window`.

        Raises:
            UserError: a name that a checkpoint cannot hold.
        """
        if isinstance(self.state, str):
            raise UserError(f"an optimizer rule's state is a tuple of names, not {self.state!r}")
        for name in self.state:
            if name in ("weights", "window") or not name.isidentifier():
                raise UserError(f"an optimizer rule cannot call what it keeps {name!r}")

    @property
    def state_bytes(self) -> int:
        """Bytes that it keeps of each parameter."""
        return 4 * len(self.state)

    def make(
        self, config: OptimizerConfig, width_multiplier: float, parameters: list[Any]
    ) -> Optimizer:
        """The optimizer of some parameters; imports torch.

        Raises:
            UserError: the rule needs whole matrices, of which a rank holds ranges, or is none that
                megatron-core takes.
        """
        from torch.optim import AdamW

        if self.whole_matrices:
            raise UserError(
                f"{self.made_by} needs whole matrices, and a rank holds a range of each parameter; "
                f"a rule has to work on ranges"
            )
        module, _, name = self.made_by.partition(":")
        made = getattr(importlib.import_module(module), name)(config, width_multiplier, parameters)
        if not isinstance(made, AdamW):
            raise UserError(
                f"{self.made_by} returned {type(made).__name__}; megatron-core's sharded optimizer "
                f"takes a torch.optim.AdamW, or a subclass with a step of its own"
            )
        return made


_TABLE: dict[str, Rule] = {
    "adamw": Rule("nlscale.optim.adamw:adamw", state=("exp_avg", "exp_avg_sq")),
}


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
