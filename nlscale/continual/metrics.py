"""What can be measured of a task. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation (`nlscale.evaluate.table`)."""

    evaluation: str
    figure: str
    higher: bool
    """Whether more of it is better."""
    label: str
    """With its unit, in figures."""


METRICS = {
    "bits_per_byte": Metric("loss", "bits_per_byte", higher=False, label="bits a byte"),
    "loss": Metric("loss", "loss", higher=False, label="loss (nats a token)"),
}
RECORD = "task-scores"
"""The hook that takes scores, and the name of its records in metrics.jsonl."""
