"""What the steps of this start cost: time, what of it was waiting, memory, and use of the GPUs."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from nlscale.config.curriculum import TrainingStage, at_stage
from nlscale.config.vocabulary import Config
from nlscale.model.flops import flops_per_token
from nlscale.parallel.devices import peak_flops, peak_memory
from nlscale.parallel.layout import Layout
from nlscale.step.waits import Waits
from nlscale.train.prepare import Prepared


class Costs:
    """Of each step, for its record, and of all of them, for the summary.

    Waiting and memory are those of this rank; speed and use are those of all.
    """

    def __init__(self, config: Config, prepared: Prepared, layout: Layout) -> None:
        self._device = layout.device
        self._flops_per_token = {
            stage.sequence_length: flops_per_token(at_stage(config, stage), prepared.vocabulary)
            for stage in prepared.stages
        }
        most = peak_flops(layout.device, config.train.dtype)
        self._most = most and most * layout.world
        self._speeds: list[float] = []
        self._mfus: list[float | None] = []
        self._waits = dict.fromkeys(asdict(Waits()), 0.0)
        """Of all steps together."""

    def of_step(
        self, stage: TrainingStage, tokens: int, seconds: float, waits: Waits
    ) -> dict[str, Any]:
        """The part of a train record that tells of it.

        Args:
            stage: in which it was taken.
            tokens: of the step, over all ranks.
            seconds: that it took.
            waits: of this rank.
        """
        self._speeds.append(tokens / seconds)
        flops = self._speeds[-1] * self._flops_per_token[stage.sequence_length]
        self._mfus.append(self._most and flops / self._most)
        for kind, waited in asdict(waits).items():
            self._waits[kind] += waited
        return {
            "tokens_per_second": self._speeds[-1],
            "step_seconds": seconds,
            "mfu": self._mfus[-1],
            "peak_memory_bytes": peak_memory(self._device),
            "waits": asdict(waits),
        }

    def summary(self) -> dict[str, Any]:
        """Medians over the steps, most memory, and mean waiting; null where no step was taken."""
        steps = len(self._speeds)
        mfus = [mfu for mfu in self._mfus if mfu is not None]
        return {
            "tokens_per_second": statistics.median(self._speeds) if steps else None,
            "mfu": statistics.median(mfus) if mfus else None,
            "peak_memory_bytes": peak_memory(self._device),
            "waits": {
                kind: total / steps if steps else None for kind, total in self._waits.items()
            },
        }
