"""What the runs of a stream have found: the matrix of each, and a table of the methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.config import schema
from nlscale.continual.matrix import FIGURES, Matrix, differences, over_seeds
from nlscale.continual.metrics import RECORD
from nlscale.continual.stream import METHOD, SEED, Stream
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.status import Status
from nlscale.telemetry.figures import read_records, update_steps
from nlscale.telemetry.files import replace, to_json

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Curves:
    """The scores of a run, whenever they were taken, and the updates of its levels."""

    scores: dict[int, list[float]]
    """Of all tasks, by the steps before."""
    updates: dict[str, list[int]]
    """Steps at which each level made an update."""

    def matrix(self, stream: Stream) -> Matrix:
        """Of the boundaries alone.

        Raises:
            KeyError: one has not been scored.
        """
        rows = [self.scores[end] for end in stream.ends]
        return Matrix(self.scores[0], rows, stream.metric.higher)


def read_curves(stream: Stream, folder: Path) -> Curves:
    """From a run's metrics.jsonl.

    Raises:
        UserError: it cannot be read, or lacks the scores of a boundary.
    """
    records = read_records(folder)
    keys = [f"{task}/{stream.metric_name}" for task in stream.tasks]
    scores = {
        int(record["step"]): [float(record[key]) for key in keys]
        for record in records
        if record.get("name") == RECORD
    }
    if missing := {0, *stream.ends} - scores.keys():
        raise UserError(
            f"{folder} has no scores after step {min(missing):,}; move it away, and the same "
            f"command trains it anew"
        )
    return Curves(scores, update_steps(r for r in records if r.get("kind") == "train"))


def baseline_of(stream: Stream, given: str | None) -> str:
    """The method that the others are compared with; None: the first.

    Raises:
        UserError: none is called so.
    """
    if given is not None and given not in stream.methods:
        raise UserError(
            f"--baseline: no method of {stream.path} is called {given!r}; "
            f"{schema.nearest(given, stream.methods)}"
        )
    return given or stream.methods[0]


def results(
    stream: Stream, runs: list[Run], states: Mapping[str, Status], baseline: str
) -> tuple[dict[str, Any], dict[str, dict[str, Curves]]]:
    """What the finished runs have found.

    Args:
        stream: whose they are.
        runs: all of it.
        states: of each by its name.
        baseline: the method that the others are compared with.

    Returns:
        As JSON holds it, and the curves of each method by the name of the seed.

    Keys:
        stream, dir, metric, higher_is_better, tasks, ends (the last step of each task), baseline;
        methods, by name, of those with a finished run: seeds; matrix and before, means over them;
        runs, by seed, with before, matrix and figures; figures (average, learned, forgetting,
        backward, forward), each mean, interval (95%, Student; null of one seed) and seeds; against,
        the paired differences from the baseline by seed, of the same figures.

    Raises:
        UserError: as `read_curves`.
    """
    curves: dict[str, dict[str, Curves]] = {}
    for run in runs:
        if states[run.name].finished:
            of_method = curves.setdefault(run.axes[METHOD], {})
            of_method[run.axes[SEED]] = read_curves(stream, run.folder)
    matrices_of = {
        name: {seed: each.matrix(stream) for seed, each in of_method.items()}
        for name, of_method in curves.items()
    }
    figures_of = {
        name: {seed: each.figures() for seed, each in matrices.items()}
        for name, matrices in matrices_of.items()
    }
    methods: dict[str, Any] = {}
    for name, matrices in matrices_of.items():
        found = figures_of[name]
        methods[name] = {
            "made_of": stream.helps[name],
            "seeds": list(matrices),
            "before": np.mean([m.before for m in matrices.values()], 0).tolist(),
            "matrix": np.mean([m.rows for m in matrices.values()], 0).tolist(),
            "runs": {
                seed: {"before": list(m.before), "matrix": [list(r) for r in m.rows], **found[seed]}
                for seed, m in matrices.items()
            },
            "figures": {
                figure: over_seeds([each[figure] for each in found.values()]) for figure in FIGURES
            },
            "against": _against(found, figures_of.get(baseline, {})) if name != baseline else None,
        }
    plain = {
        "stream": str(stream.path),
        "dir": str(stream.sweep.folder),
        "metric": stream.metric_name,
        "higher_is_better": stream.metric.higher,
        "tasks": stream.tasks,
        "ends": stream.ends,
        "baseline": baseline,
        "methods": methods,
    }
    return plain, curves


def write_results(stream: Stream, plain: Mapping[str, Any]) -> Path:
    """Write them into the folder of the stream."""
    out = stream.sweep.folder / RESULTS_FILE
    replace(out, (to_json(dict(plain), indent=1) + "\n").encode())
    return out


def _against(
    ours: dict[str, dict[str, float]], theirs: dict[str, dict[str, float]]
) -> dict[str, Any] | None:
    """Paired differences; None where no seed is of both."""
    if not ours.keys() & theirs.keys():
        return None
    return {
        figure: over_seeds(
            differences(
                {seed: each[figure] for seed, each in ours.items()},
                {seed: each[figure] for seed, each in theirs.items()},
            )
        )
        for figure in FIGURES
    }
