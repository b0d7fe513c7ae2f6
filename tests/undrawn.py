"""Runs leave a line of text where their figure would be.

A run draws its figure when it ends, which takes as long as a dozen steps of a small model. Imported
by the process from which the ranks of tests and the runs of sweeps are forked (see `world.ready`).
"""

from __future__ import annotations

import time
from pathlib import Path

from nlscale.telemetry import run


def _draw_none(run_dir: Path) -> Path:
    figure = run_dir / "loss.png"
    figure.write_text(f"not drawn at {time.time_ns()}")  # so that no two are the same
    return figure


run.draw_loss = _draw_none
