"""Measured points, from a CSV file or from finished runs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.config.scalars import Unreadable, number
from nlscale.errors import UserError
from nlscale.scaling.law.law import FLOPS_PER_PARAMETER_TOKEN, Array
from nlscale.scaling.law.setting import said_of_periods

FEWEST_POINTS = 8
FEWEST_DISTINCT = 3
TOTAL, NON_EMBEDDING = "total", "non-embedding"
"""Which parameters N counts. All of them is what Hoffmann et al. 2022 do and Pearce & Song 2024
recommend: without the embedding, laws of small models bend."""
RUN, PERIODS = "run", "periods"
"""Columns of a run beside its configuration: its folder, and its levels' periods in steps."""

Row = dict[str, str]


class TooFew(UserError):
    """Points, or sizes or lengths among them, that are too few for a law."""


@dataclass(frozen=True)
class Points:
    """Parameters, tokens, nats per token and FLOPs of each run, each of shape (points,).

    `rows` are the same runs with every column as text; `source` names where they are from;
    `period` is that of the levels in steps, None where the law is not to know of it.
    """

    n: Array
    d: Array
    loss: Array
    flops: Array
    rows: tuple[Row, ...]
    source: str
    period: Array | None = None

    @classmethod
    def of(cls, n: Any, d: Any, loss: Any, period: Any = None) -> Points:
        """Points of plain sequences, with 6 N D FLOPs."""
        n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
        flops = FLOPS_PER_PARAMETER_TOKEN * n * d
        if period is not None:
            period = np.asarray(period, dtype=np.float64)
        return cls(n, d, loss, flops, ({},) * len(n), "points", period)

    @property
    def periods_vary(self) -> bool:
        """Whether runs of several settings of the levels' periods are among them."""
        return len({row[PERIODS] for row in self.rows if PERIODS in row}) > 1

    @property
    def per_pair(self) -> float:
        """FLOPs a parameter and token: the geometric mean over the points, 6 without `flops`."""
        return float(np.exp(np.mean(np.log(self.flops / (self.n * self.d)))))

    @property
    def per_pair_spread(self) -> float:
        """Largest over smallest FLOPs a parameter and token; 1 where C = k N D exactly."""
        each = self.flops / (self.n * self.d)
        return float(each.max() / each.min())

    def check(self) -> Points:
        """Themselves.

        Raises:
            TooFew: fewer than 8 points (9 with periods), or 3 distinct N or D (1 % apart).
            UserError: with periods, fewer than 2 of them.
        """
        more = self.period is not None
        if len(self.n) < FEWEST_POINTS + more:
            raise TooFew(
                f"{self.source}: {len(self.n)} points are too few for a law of {5 + more} "
                f"parameters; at least {FEWEST_POINTS + more} are needed"
            )
        if self.period is not None and distinct(self.period) < 2:
            raise UserError(
                f"{self.source}: every run has the period {self.period[0]:.3g}; what a period "
                f"costs needs runs of others, or a fit without --period"
            )
        for name, values in (("N", self.n), ("D", self.d)):
            count = distinct(values)
            if count < FEWEST_DISTINCT:
                raise TooFew(
                    f"{self.source}: {count} distinct {name} are too few; at least "
                    f"{FEWEST_DISTINCT} are needed to tell its exponent from a constant"
                )
        return self

    def where(self, column: str, value: str) -> Points:
        """Those whose `column` is `value`.

        Raises:
            UserError: there is no such column, or no such value in it.
        """
        values = self.values(column)
        if value not in values:
            raise UserError(
                f"{self.source}: no row has {column}={value}; there are {', '.join(values)}"
            )
        return self._at(
            np.array([row.get(column) == value for row in self.rows]), f"{column}={value}"
        )

    def without_idle_period(self) -> Points:
        """Themselves; where every run has period 1, which then costs nothing, without it."""
        idle = self.period is not None and distinct(np.append(self.period, 1.0)) == 1
        return replace(self, period=None) if idle else self

    def values(self, column: str) -> list[str]:
        """The distinct values of a column, in the order of the rows.

        Raises:
            UserError: there is no such column.
        """
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        if column not in columns:
            raise UserError(f"{self.source}: no column {column!r}; there are {', '.join(columns)}")
        return list(dict.fromkeys(row[column] for row in self.rows if row.get(column)))

    def _at(self, kept: np.ndarray, label: str) -> Points:
        arrays = {k: getattr(self, k)[kept] for k in ("n", "d", "loss", "flops")}
        if self.period is not None:
            arrays["period"] = self.period[kept]
        rows = tuple(row for row, keep in zip(self.rows, kept, strict=True) if keep)
        return replace(self, **arrays, rows=rows, source=f"{self.source} ({label})")


def read_points(
    paths: Iterable[Path], parameters: str = TOTAL, period: bool = False
) -> tuple[Points, list[str]]:
    """Points of one CSV file, or of run folders and folders of runs.

    A CSV file has columns N (parameters), D (tokens) and loss (nats per token), perhaps flops,
    N_non_embedding, C (the period of the levels in steps), and any others. Of a run N, D and loss
    are `parameters`, `tokens` and `final_val_loss` of its summary.json, C is the geometric mean of
    the periods of its levels, and its other columns are the keys of its config.yaml
    (`model.layers`).

    Args:
        paths: of the CSV file or the runs.
        parameters: which N counts, `total` or `non-embedding`.
        period: whether the points have the period of the levels.

    Returns:
        The points, and a line for each run that is left out because it has not finished.

    Raises:
        UserError: a file that cannot be read, a missing column, a value that is not a positive
            number (with its row), or nothing to fit.
    """
    paths = list(paths)
    files = [path for path in paths if not path.is_dir()]
    if files and len(paths) > 1:
        raise UserError(f"give one CSV file, or run folders; {files[0]} is not a folder")
    skipped: list[str] = []
    if files:
        points = _read_csv(files[0], parameters, period)
    else:
        points, skipped = _read_runs(paths, parameters, period)
    if parameters == NON_EMBEDDING:
        points = replace(points, source=f"{points.source}, N without the embedding")
    return points, skipped


def _read_csv(path: Path, parameters: str, period: bool) -> Points:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = [" ".join(name.split()) for name in reader.fieldnames or []]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} is there twice; take one out")
    wanted = [_size_column(parameters), "D", "loss"] + ["C"] * period
    missing = [name for name in wanted if name not in names]
    if missing:
        there = ", ".join(names) or "none"
        raise UserError(f"{path}: no column {', '.join(missing)}; there are {there}")
    plain = []
    for line, row in rows:
        # DictReader puts what is beyond the header under None, and None where a row is short.
        if None in row:
            raise UserError(f"{path}, row {line}: more values than the {len(names)} columns")
        plain.append((f"{path}, row {line}", {k: (v or "").strip() for k, v in row.items()}))
    return _points(plain, str(path), parameters, period)


def _read_runs(folders: list[Path], parameters: str, period: bool) -> tuple[Points, list[str]]:
    import yaml

    runs: list[Path] = []
    for folder in folders:
        if (folder / "config.yaml").exists() or (folder / "summary.json").exists():
            runs.append(folder)
        else:
            runs += sorted(found.parent for found in folder.rglob("config.yaml"))
    rows, skipped = [], []
    for run in runs:
        try:
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            measured = _measured(run, summary)
        except FileNotFoundError as error:
            skipped.append(f"{run} is left out: it has no {Path(error.filename).name}")
            continue
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"cannot read {run}: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            raise UserError(f"cannot read {run}: its config.yaml is no configuration")
        loss = summary.get("final_val_loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            skipped.append(f"{run} is left out: final_val_loss is {loss}")
            continue
        row = {**_flat(config), **measured}
        rows.append((str(run), row))
    if not rows:
        where = ", ".join(map(str, folders))
        raise UserError(f"no finished run in {where}; {len(skipped)} have not finished")
    return _points(rows, f"{len(rows)} runs", parameters, period), skipped


_RECORDED = {
    "N": "parameters",
    "N_non_embedding": "parameters_non_embedding",
    "D": "tokens",
    "loss": "final_val_loss",
    "flops": "flops",
    "C": "levels",
}
"""The key of summary.json that each column of a run is made of."""
MEASURED = (*_RECORDED, RUN, PERIODS)
"""Columns of a run that are no keys of its configuration."""


def _measured(run: Path, summary: Any) -> Row:
    """The columns that follow from a run's summary. Raises ValueError: it is not one."""
    levels = summary.get("levels", []) if isinstance(summary, dict) else None
    if not isinstance(levels, list) or not all(
        isinstance(level, dict) and _is_period(level.get("period_steps")) for level in levels
    ):
        raise ValueError("its summary.json is damaged")
    measured = {name: summary.get(key) for name, key in _RECORDED.items() if key != "levels"}
    measured[RUN] = run
    periods = [level["period_steps"] for level in levels]
    if periods:
        parts = [level.get("parts", []) for level in levels]
        measured[PERIODS] = ", ".join(said_of_periods(periods, parts))
        measured["C"] = math.exp(math.fsum(map(math.log, periods)) / len(periods))
    return {name: str(value) for name, value in measured.items() if value is not None}


def _is_period(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _size_column(parameters: str) -> str:
    return "N" if parameters == TOTAL else "N_non_embedding"


def _flat(config: dict[str, Any], prefix: str = "") -> Row:
    found: Row = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _points(rows: list[tuple[str, Row]], source: str, parameters: str, period: bool) -> Points:
    size = _size_column(parameters)
    columns: dict[str, list[float]] = {name: [] for name in (size, "D", "loss")}
    if any("flops" in row for _, row in rows):
        columns["flops"] = []
    if period:
        columns["C"] = []
    for where, row in rows:
        for name, values in columns.items():
            text = row.get(name)
            if text is None:  # of a run only: a row of a CSV file has every column
                raise UserError(
                    f"{where}: its summary.json has no {_RECORDED[name]}, which {name} is made of; "
                    f"leave that run out, or ask for nothing that needs it"
                )
            try:
                value = number(text)
            except Unreadable as error:
                fix = f"; {error}" if str(error) else ""
                raise UserError(
                    f"{where}: {name} is {text!r}, which is not a number{fix}"
                ) from None
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{where}: {name} is {text}; it must be finite and above 0")
            if name == "C" and value < 1:
                raise UserError(f"{where}: C is {text}; a period is at least 1 step")
            values.append(value)
    n, d, loss = (np.array(columns[name]) for name in (size, "D", "loss"))
    flops = np.array(columns["flops"]) if "flops" in columns else FLOPS_PER_PARAMETER_TOKEN * n * d
    periods = np.array(columns["C"]) if period else None
    return Points(n, d, loss, flops, tuple(row for _, row in rows), source, periods)


def distinct(values: Array) -> int:
    """How many there are, a percent apart."""
    return 1 + int((np.diff(np.sort(np.log(values))) > 0.01).sum())
