"""What the steps of this start cost: time, what of it was waiting, memory, and use of the GPUs."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

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
        self._flops_per_token = flops_per_token(config, prepared.vocabulary)
        most = peak_flops(layout.device, config.train.dtype)
        self._most = most and most * layout.world
        self._steps: list[dict[str, Any]] = []

    def of_step(self, tokens: int, seconds: float, waits: Waits) -> dict[str, Any]:
        """The part of a train record that tells of it.

        Args:
            tokens: of the step, over all ranks.
            seconds: that it took.
            waits: of this rank.
        """
        speed = tokens / seconds
        cost = {
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": self._most and speed * self._flops_per_token / self._most,
            "peak_memory_bytes": peak_memory(self._device),
            "waits": asdict(waits),
        }
        self._steps.append(cost)
        return cost

    def summary(self) -> dict[str, Any]:
        """Medians over the steps, most memory, and mean waiting; null where no step was taken."""
        steps = self._steps
        return {
            "tokens_per_second": _median([step["tokens_per_second"] for step in steps]),
            "mfu": _median([step["mfu"] for step in steps]) if self._most else None,
            "peak_memory_bytes": peak_memory(self._device),
            "waits": {
                kind: statistics.fmean(step["waits"][kind] for step in steps) if steps else None
                for kind in asdict(Waits())
            },
        }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
