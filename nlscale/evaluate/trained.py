"""The evaluations of a trained model by name, as `nlscale eval` asks. No torch is imported.

Those that ask a model while it trains are in `nlscale.evaluate.table`. One of this package takes a
folder, and a few lines here. A package of your own calls `register` when it is imported, by
`--import`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlscale.config.schema import nearest
from nlscale.data.tasks.table import FAMILIES
from nlscale.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from nlscale.evaluate.asking.context import Context
    from nlscale.generate.model import Model

Result = dict[str, Any]
"""What an evaluation found, as JSON holds it."""


@dataclass(frozen=True)
class Answer:
    """What one model answered."""

    label: str
    """The model, as it was named."""
    step: int
    mixer: str
    result: Result

    def described(self) -> Result:
        """For JSON."""
        return {"run": self.label, "step": self.step, "mixer": self.mixer, **self.result}


@dataclass(frozen=True)
class Failed:
    """A model that has no answer, where others have."""

    label: str
    """The model, as it was named."""
    error: str
    """Cause and fix, a line."""

    def described(self) -> Result:
        """For JSON."""
        return {"run": self.label, "error": self.error}


@dataclass(frozen=True)
class Trained:
    """A question asked of trained models. Names are `package.module:function`, imported when asked.

    Attributes:
        help: a line.
        description: a few more.
        arguments: `add_arguments(parser)`, of a module that imports no torch: options alone, their
            values plain. A file or folder is a `Path` (`nlscale.config.arguments.path`), so that
            results are kept by what it holds.
        made_by: `evaluate(model, options, context) -> Result`. Called on every rank alike, with the
            namespace of the options; work that ranks can share goes through `context.parts`, which
            also keeps what is done and says how far it is. What the first rank returns counts:
            whatever JSON holds, and under "figures" those numbers, by name, that wandb gets.
        shown_by: `show(console, answers)`, of a module that imports no torch: prints the answers of
            one or several models to the same options, beside each other.
        drawn_by: `draw(answers, out)`: writes a figure; None: there is none.
        speed: names of options that change how fast it is and no figure, so that a result that is
            kept answers whatever they are.
    """

    help: str
    description: str
    arguments: str
    made_by: str
    shown_by: str
    drawn_by: str | None = None
    speed: tuple[str, ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add its options to a parser."""
        _named(self.arguments)(parser)

    def evaluate(self, model: Model, options: argparse.Namespace, context: Context) -> Result:
        """Ask a model; imports torch."""
        result: Result = _named(self.made_by)(model, options, context)
        return result

    def show(self, console: Console, answers: Sequence[Answer]) -> None:
        """Print them."""
        _named(self.shown_by)(console, answers)

    def draw(self, answers: Sequence[Answer], out: Path) -> None:
        """Write the figure of them."""
        assert self.drawn_by is not None
        _named(self.drawn_by)(answers, out)


def _named(name: str) -> Any:
    """What a name stands for.

    Raises:
        UserError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        fix = "an evaluation names what it is made of as package.module:function"
        raise UserError(f"{name!r} cannot be imported: {error}; {fix}") from error


def _instrument(family: str) -> Trained:
    return Trained(
        help=f"score models that were trained on {' '.join(FAMILIES[family])}",
        description="Score models on fresh examples of the task that they were trained on, and on "
        "longer ones: how often the most likely token is the right one, over the targets that "
        "count, and how many examples have no mistake; with 95% intervals (Wilson).",
        arguments="nlscale.evaluate.instruments.options:add_arguments",
        made_by="nlscale.evaluate.instruments.score:evaluate",
        shown_by="nlscale.evaluate.instruments.show:show",
    )


TRAINED: dict[str, Trained] = {
    "loss": Trained(
        help="loss by position in the context, on any text",
        description="Perplexity and bits a byte by position in the context, on the held-out text "
        "of each model's own data, on a data folder, or on a text file; with 95% intervals over "
        "the contexts. The text is read in pieces, so that a model of constant state needs no more "
        "memory for a long context than for a short one.",
        arguments="nlscale.evaluate.position.options:add_arguments",
        made_by="nlscale.evaluate.position.measure:evaluate",
        shown_by="nlscale.evaluate.position.show:show",
        drawn_by="nlscale.evaluate.position.figure:draw",
    ),
    "needle": Trained(
        help="needles in a haystack, by length and depth",
        description="Hide keys with values in text, ask for them at its end, and generate the "
        "answer greedily: which share of the values it contains, by kind of question, length and "
        "depth; with 95% intervals (Wilson). The kinds are those of RULER.",
        arguments="nlscale.evaluate.needles.options:add_arguments",
        made_by="nlscale.evaluate.needles.ask:evaluate",
        shown_by="nlscale.evaluate.needles.show:show",
        drawn_by="nlscale.evaluate.needles.figure:draw",
    ),
    "recall": _instrument("recall"),
    "automata": _instrument("automata"),
    "mad": _instrument("mad"),
    "babi": _instrument("babi"),
    "harness": Trained(
        help="tasks of lm-evaluation-harness, its own or yours",
        description="Ask models the tasks of lm-evaluation-harness: its own by name, whose data "
        "come from the Hugging Face hub, yours by a YAML file, or a suite by one name; with 95% "
        "intervals over the documents of each task. A context is read whole, whatever its length, "
        "and once for all its continuations.",
        arguments="nlscale.evaluate.harness.arguments:add_arguments",
        made_by="nlscale.evaluate.harness.measure:evaluate",
        shown_by="nlscale.evaluate.harness.show:show",
        speed=("batch",),
    ),
}


def trained(name: str) -> Trained:
    """The evaluation of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TRAINED:
        raise UserError(f"no evaluation is called {name!r}; {nearest(name, TRAINED)}")
    return TRAINED[name]


def register(name: str, new: Trained) -> None:
    """Add an evaluation, which `nlscale eval` knows from then on.

    Raises:
        UserError: the name is taken.
    """
    if name in TRAINED:
        raise UserError(f"an evaluation is called {name!r} already; give yours another name")
    TRAINED[name] = new
