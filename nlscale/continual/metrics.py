"""What can be measured of a task. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What `nlscale.continual.methods.scores` finds of a task."""

    higher: bool
    """Whether more of it is better."""
    label: str
    """With its unit, in figures."""
    labelled: bool = False
    """Whether it is of labels (`nlscale.continual.labels`), and not of the loss."""


METRICS = {
    "bits_per_byte": Metric(higher=False, label="bits a byte"),
    "loss": Metric(higher=False, label="loss (nats a token)"),
    "accuracy": Metric(higher=True, label="accuracy of labels", labelled=True),
}
RECORD = "task-scores"
"""The hook that takes scores, and the name of its records in metrics.jsonl."""
LEARN = "learn-in-context"
"""The hook that has levels read what they keep."""
