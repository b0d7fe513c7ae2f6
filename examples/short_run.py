"""Starts a short run from Python, with overrides, and prints its summary when it has finished.

python examples/short_run.py [KEY=VALUE ...]
"""

from __future__ import annotations

import sys

import nlscale
from nlscale.errors import Stopped, UserError


def main(*overrides: str) -> None:
    """Train the quickstart's recipe for 20 steps, with two levels."""
    short = ["run.dir=runs/short", "train.steps=20", "levels=[1,4]"]
    short += ["train.validation_sequences=8", "optimizer.warmup_steps=5"]
    try:
        run = nlscale.start("quickstart", *short, *overrides)
    except Stopped as stopped:
        sys.exit(f"{stopped}")  # it has saved; the same call goes on
    except UserError as error:
        sys.exit(f"not trained: {error}")
    summary = run.summary or {}
    for name in ("steps", "tokens", "parameters", "initial_loss", "final_val_loss"):
        print(f"{name:16}{summary[name]:>14,.5g}")
    for level in summary["levels"]:
        print(f"{level['name']:16}{level['updates']:>14} updates")


if __name__ == "__main__":
    main(*sys.argv[1:])
