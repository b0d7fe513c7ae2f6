"""The evaluations by name: the one place that knows which there are. No torch is imported.

An evaluation of this package takes its file and a line here. A package of your own calls `register`
when it is imported; a recipe names it in `run.imports`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nlscale.config.schema import nearest
from nlscale.errors import UserError

if TYPE_CHECKING:
    from nlscale.data import Samples
    from nlscale.step.trainer import Trainer


@dataclass(frozen=True)
class Evaluation:
    """A question asked of a model."""

    made_by: str
    """`package.module:function`, imported when asked. Called on every rank alike with the trainer
    and held-out samples, it returns figures by name, the same on every rank; it leaves the trainer
    as it was."""

    def run(self, trainer: Trainer, samples: Samples) -> dict[str, Any]:
        """The figures of the model as it stands; imports torch."""
        module, _, name = self.made_by.partition(":")
        return getattr(importlib.import_module(module), name)(trainer, samples)


_TABLE: dict[str, Evaluation] = {
    "loss": Evaluation("nlscale.evaluate.loss:loss"),
    "positions": Evaluation("nlscale.evaluate.position.training:positions"),
    "task": Evaluation("nlscale.evaluate.accuracy:accuracy"),
}


def evaluation(name: str) -> Evaluation:
    """The evaluation of that name.

    Raises:
        UserError: there is none.
    """
    if name not in _TABLE:
        raise UserError(f"no evaluation is called {name!r}; {nearest(name, _TABLE)}")
    return _TABLE[name]


def check(names: list[str]) -> None:
    """Refuse names of no evaluation.

    Raises:
        UserError: the key, the name and the nearest.
    """
    for name in names:
        try:
            evaluation(name)
        except UserError as error:
            hint = "--import the module that adds another"
            raise UserError(f"evaluate: {error}; {hint}") from None


def register(name: str, new: Evaluation) -> None:
    """Add an evaluation, which `evaluate` can name from then on.

    Raises:
        UserError: the name is taken.
    """
    if name in _TABLE:
        raise UserError(f"an evaluation is called {name!r} already; give yours another name")
    _TABLE[name] = new
