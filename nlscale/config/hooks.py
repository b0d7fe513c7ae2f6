"""The keys of `hooks` (docs/how-to/hook-into-a-run.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nlscale.config.fields import within


@dataclass
class HookConfig:
    """What is called in the course of a run, on the cadence of a level or after some steps; see
    nlscale.train.hooks."""

    name: str = MISSING
    """Which: evaluate, average or replay, or one that a module of `run.imports` adds. A run has one
    of a name."""
    level: str | None = None
    """Name of the level at whose updates it is called, once a period; null: of none."""
    steps: list[int] = within([], above=0)
    """Steps after which it is called, beside that."""
    options: dict[str, Any] = field(default_factory=dict)
    """What it is told, by the names of its own options."""
