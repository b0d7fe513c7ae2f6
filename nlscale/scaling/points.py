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

from nlscale.errors import UserError
from nlscale.scaling.law import FLOPS_PER_PARAMETER_TOKEN, Array

FEWEST_POINTS = 8
FEWEST_DISTINCT = 3

Row = dict[str, str]


@dataclass(frozen=True)
class Points:
    """Parameters, tokens, nats per token and FLOPs of each run, each of shape (points,).

    `rows` are the same runs with every column as text; `source` names where they are from.
    """

    n: Array
    d: Array
    loss: Array
    flops: Array
    rows: tuple[Row, ...]
    source: str

    @classmethod
    def of(cls, n: Any, d: Any, loss: Any) -> Points:
        """Points of plain sequences, with 6 N D FLOPs."""
        n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
        return cls(n, d, loss, FLOPS_PER_PARAMETER_TOKEN * n * d, ({},) * len(n), "points")

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
            UserError: fewer than 8 points, or fewer than 3 distinct N or D (1 % apart).
        """
        if len(self.n) < FEWEST_POINTS:
            raise UserError(
                f"{self.source}: {len(self.n)} points are too few for a law of 5 parameters; at "
                f"least {FEWEST_POINTS} are needed"
            )
        for name, values in (("N", self.n), ("D", self.d)):
            distinct = 1 + int((np.diff(np.sort(np.log(values))) > 0.01).sum())
            if distinct < FEWEST_DISTINCT:
                raise UserError(
                    f"{self.source}: {distinct} distinct {name} are too few; at least "
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
        rows = tuple(row for row, keep in zip(self.rows, kept, strict=True) if keep)
        return replace(self, **arrays, rows=rows, source=f"{self.source} ({label})")


def read_points(paths: Iterable[Path]) -> tuple[Points, list[str]]:
    """Points of one CSV file, or of run folders and folders of runs.

    A CSV file has columns N (parameters), D (tokens) and loss (nats per token), perhaps flops,
    and any others. Of a run N, D and loss are `parameters`, `tokens` and `final_val_loss` of its
    summary.json, and its other columns the keys of its config.yaml (`model.layers`).

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
    if files:
        return _read_csv(files[0]), []
    return _read_runs(paths)


def _read_csv(path: Path) -> Points:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            names = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    missing = [name for name in ("N", "D", "loss") if name not in names]
    if missing:
        there = ", ".join(names) or "none"
        raise UserError(f"{path}: no column {', '.join(missing)}; there are {there}")
    plain = []
    for line, row in rows:
        # DictReader puts what is beyond the header under None, and None where a row is short.
        if None in row:
            raise UserError(f"{path}, row {line}: more values than the {len(names)} columns")
        plain.append((f"{path}, row {line}", {k: (v or "").strip() for k, v in row.items()}))
    return _points(plain, str(path))


def _read_runs(folders: list[Path]) -> tuple[Points, list[str]]:
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
        except FileNotFoundError as error:
            skipped.append(f"{run} is left out: it has no {Path(error.filename).name}")
            continue
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"cannot read {run}: {' '.join(str(error).split())}") from None
        loss = summary.get("final_val_loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            skipped.append(f"{run} is left out: final_val_loss is {loss}")
            continue
        measured = {"N": summary.get("parameters"), "D": summary.get("tokens"), "loss": loss}
        if summary.get("flops") is not None:
            measured["flops"] = summary["flops"]
        row = {**_flat(config or {}), **{k: str(v) for k, v in measured.items()}}
        rows.append((str(run), row))
    if not rows:
        where = ", ".join(map(str, folders))
        raise UserError(f"no finished run in {where}; {len(skipped)} have not finished")
    return _points(rows, f"{len(rows)} runs"), skipped


def _flat(config: dict[str, Any], prefix: str = "") -> Row:
    found: Row = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _points(rows: list[tuple[str, Row]], source: str) -> Points:
    columns: dict[str, list[float]] = {"N": [], "D": [], "loss": []}
    if rows and "flops" in rows[0][1]:
        columns["flops"] = []
    for where, row in rows:
        for name, values in columns.items():
            text = row.get(name, "")
            try:
                value = float(text)
            except ValueError:
                raise UserError(f"{where}: {name} is {text!r}, which is not a number") from None
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{where}: {name} is {text}; it must be finite and above 0")
            values.append(value)
    n, d, loss = (np.array(columns[name]) for name in ("N", "D", "loss"))
    flops = np.array(columns["flops"]) if "flops" in columns else FLOPS_PER_PARAMETER_TOKEN * n * d
    return Points(n, d, loss, flops, tuple(row for _, row in rows), source)
