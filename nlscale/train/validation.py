"""When a run is validated, what it is asked, and how long that takes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from nlscale.cluster.life.watch import doing
from nlscale.errors import TrainingFailed
from nlscale.evaluate.table import evaluation
from nlscale.step.trainer import Trainer
from nlscale.telemetry.run import Telemetry
from nlscale.train.claim import Claim
from nlscale.train.mixed import HeldOut, mean
from nlscale.train.prepare import Prepared

_Mixed = Callable[[Sequence[dict[str, Any]], Sequence[HeldOut]], dict[str, Any]]


class Validation:
    """The validations of a run, and the other evaluations that its configuration names.

    Args:
        prepared: the run.
        trainer: whose model is asked.
        telemetry: takes the records.
        claim: on the run's folder.
    """

    def __init__(
        self, prepared: Prepared, trainer: Trainer, telemetry: Telemetry, claim: Claim
    ) -> None:
        self._prepared, self._trainer = prepared, trainer
        self._telemetry, self._claim = telemetry, claim
        self._seconds = _seconds_before(telemetry.records())
        self.held_out: dict[str, Any] = {}
        """The last validation's record."""

    def due(self, step: int) -> bool:
        """Whether the run is validated after that step."""
        train = self._trainer.config.train
        return step % train.validate_every == 0 or step == train.steps

    def reserve(self, step: int) -> float:
        """Seconds that may pass with validations until the step after the next can begin.

        Args:
            step: steps taken.
        """
        return self._seconds * sum(map(self.due, (step + 1, step + 2)))

    def run(self) -> None:
        """Validate, evaluate, and record what was found."""
        started = time.monotonic()
        self.held_out = self._ask("loss", "validation", validated) | self._of_end()
        self.held_out["seconds"] = time.monotonic() - started
        self._claim.check()
        self._telemetry.validation(self.held_out)
        for name in self._trainer.config.evaluate:
            found = self._ask(name, "evaluation", by_source)
            self._claim.check()
            self._telemetry.evaluation(name, found)
        self._seconds = time.monotonic() - started

    def _of_end(self) -> dict[str, Any]:
        """The same at the sequence length with which the run ends, where that is another."""
        held_out = self._prepared.validation_of_end
        if held_out is None:
            return {}
        with doing("validation"):
            found = self._found("loss", held_out, validated)
        length = held_out[0].samples.sequence_length
        return {"of_end": {"sequence_length": length, **found}}

    def _found(self, name: str, held_out: Sequence[HeldOut], mixed: _Mixed) -> dict[str, Any]:
        """What an evaluation finds; of the sources of a mixture, what `mixed` makes of it."""
        asked = evaluation(name)
        figures = [asked.run(self._trainer, each.samples) for each in held_out]
        return figures[0] if self._prepared.sources is None else mixed(figures, held_out)

    def _ask(self, name: str, kind: str, mixed: _Mixed) -> dict[str, Any]:
        """The record of an evaluation."""
        started, counters = time.monotonic(), self._trainer.counters
        with doing(kind):
            found = self._found(name, self._prepared.validation, mixed)
        own = {
            "kind": kind,
            "step": counters.step,
            "time": time.time(),
            "seconds": time.monotonic() - started,
            "tokens": counters.tokens,
        }
        if taken := found.keys() & own.keys():
            raise TrainingFailed(
                f"the evaluation {name!r} calls a figure {min(taken)!r}, as every record calls "
                f"something else; give it another name"
            )
        return {**own, **found}


def validated(figures: Sequence[dict[str, Any]], held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """The losses of each source, and of the mixture: their mean by the shares of its weights.

    Its bits per byte are those of a text that is mixed in these shares of tokens, and None where a
    source has none. A source none of whose held-out targets counts is left out of the loss, as
    one is that the run does not begin with.
    """
    begun = [both for both in zip(figures, held_out, strict=True) if both[1].share]
    losses, shares = [each["loss"] for each, _ in begun], [one.share for _, one in begun]
    loss = mean(losses, shares)
    sizes = [one.samples.shards.bytes_per_token for _, one in begun]
    size = mean(sizes, shares) if all(sizes) and None not in losses else None
    bits = None if loss is None or size is None else loss / math.log(2) / size
    sources = {one.name: each for one, each in zip(held_out, figures, strict=True)}
    return {"loss": loss, "bits_per_byte": bits, "sources": sources}


def by_source(figures: Sequence[dict[str, Any]], held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """The figures of each source, as SOURCE/FIGURE."""
    each = zip(held_out, figures, strict=True)
    return {f"{one.name}/{name}": value for one, own in each for name, value in own.items()}


def _seconds_before(records: list[dict[str, Any]]) -> float:
    """What the last validation of a run took, before this start of it; 0 where there was none."""
    asked = [r for r in records if r.get("kind") in ("validation", "evaluation")]
    seconds = [r.get("seconds") for r in asked if r.get("step") == asked[-1].get("step")]
    return sum(s for s in seconds if isinstance(s, int | float))
