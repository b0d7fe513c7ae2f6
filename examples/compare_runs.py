"""Reads runs and prints their validation loss by step, side by side.

python examples/compare_runs.py RUN [RUN ...]
"""

from __future__ import annotations

import sys

import nlscale


def main(*folders: str) -> None:
    """Print a table: a row a step, a column a run."""
    runs = [nlscale.read(folder) for folder in folders]
    columns = []
    for run in runs:
        table = run.metrics("validation")
        columns.append(dict(zip(table["step"].to_pylist(), table["loss"].to_pylist(), strict=True)))
    print("step", *(run.folder.name for run in runs), sep="\t")
    for step in sorted({step for column in columns for step in column}):
        losses = (column.get(step) for column in columns)
        print(step, *("" if loss is None else f"{loss:.3f}" for loss in losses), sep="\t")
    print("mixer", *(run.config.model.mixer for run in runs), sep="\t")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["runs/quickstart"]))
