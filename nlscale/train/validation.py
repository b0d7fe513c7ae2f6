"""When a run is validated, what it is asked, and how long that takes it."""

from __future__ import annotations

import time
from typing import Any

from nlscale.cluster.life.watch import doing
from nlscale.errors import TrainingFailed
from nlscale.evaluate.table import evaluation
from nlscale.step.trainer import Trainer
from nlscale.telemetry.run import Telemetry
from nlscale.train.claim import Claim
from nlscale.train.prepare import Prepared


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
        self.held_out = self._ask("loss", "validation") | self._of_end()
        self.held_out["seconds"] = time.monotonic() - started
        self._claim.check()
        self._telemetry.validation(self.held_out)
        for name in self._trainer.config.evaluate:
            found = self._ask(name, "evaluation")
            self._claim.check()
            self._telemetry.evaluation(name, found)
        self._seconds = time.monotonic() - started

    def _of_end(self) -> dict[str, Any]:
        """The same at the sequence length with which the run ends, where that is another."""
        samples = self._prepared.validation_of_end
        if samples is None:
            return {}
        with doing("validation"):
            found = evaluation("loss").run(self._trainer, samples)
        return {"of_end": {"sequence_length": samples.sequence_length, **found}}

    def _ask(self, name: str, kind: str) -> dict[str, Any]:
        started, counters = time.monotonic(), self._trainer.counters
        with doing(kind):
            found = evaluation(name).run(self._trainer, self._prepared.validation)
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


def _seconds_before(records: list[dict[str, Any]]) -> float:
    """What the last validation of a run took, before this start of it; 0 where there was none."""
    asked = [r for r in records if r.get("kind") in ("validation", "evaluation")]
    seconds = [r.get("seconds") for r in asked if r.get("step") == asked[-1].get("step")]
    return sum(s for s in seconds if isinstance(s, int | float))
