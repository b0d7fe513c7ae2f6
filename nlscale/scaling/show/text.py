"""An analysis as JSON and as a person reads it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.config.units import human_count
from nlscale.scaling.law.analysis import Analysis, Multiplier, Optimum
from nlscale.scaling.law.isoflop import Frontier
from nlscale.scaling.law.law import Law
from nlscale.scaling.law.objective import DELTA
from nlscale.scaling.law.period import PeriodCosts


def to_plain(one: Analysis) -> dict[str, Any]:
    """An analysis as JSON holds it; an infinite or undefined number is null.

    Keys:
        parameters: E, A, B (nats per token), alpha, beta of L = E + A / N^alpha + B / D^beta, and
            with periods G of + G log2(period), nats per token a doubling.
        intervals: of each of them [low, high], percentiles of `resamples` bootstrap fits that hold
            the share `interval_level`; `resamples_unconverged` of the fits did not converge.
        objective: sum (not mean) of the Huber loss of log-loss residuals, delta in `delta`.
        points: the number of runs; `measured`: smallest and largest flops, N, D of them.
        converged: the gradient vanishes (`gradient`, scaled) and two starts or more agree
            (`starts_agreeing` of `starts`); `condition` is the condition number there.
        optimal: one a budget: flops, N, D, loss, intervals of the three, extrapolation (null, or
            the factors by which flops, N, D are outside the data) and refused (null, or why N, D
            and loss are null).
        exponents: a of N_opt ~ C^a, b of D_opt ~ C^b, and their intervals.
        isoflop, envelope: approaches 2 and 1: a, b, minima, reason (why a and b are null).
        sensitivity: the parameters without the `left_out` largest residuals.
        period: null, or in `settings` what each measured period costs beside period 1: period (mean
            of the levels, steps), periods (of each level; null of a CSV file), runs, loss (nats per
            token) and worth (the FLOPs with which period 1 reaches the same loss over those spent,
            when `flops` are) with their intervals, beyond (null, or the factor by which those FLOPs
            are outside the data) and residual (mean of measured over fitted loss, less 1).
        ill_conditioned: null, or why the law is not to be trusted beyond the data.
        flops_per_parameter_token: k of C = k N D. warnings: lines.
    """
    drawn, points = one.bootstrap, one.points
    a, b = one.fit.law.exponents
    a_all, b_all = drawn.laws.exponents
    plain = {
        "parameters": _parameters(one, one.fit.law),
        "intervals": {k: drawn.interval(getattr(drawn.laws, k)) for k in one.names},
        "interval_level": drawn.level,
        "resamples": drawn.count,
        "resamples_unconverged": drawn.unconverged,
        "objective": one.fit.objective,
        "delta": DELTA,
        "points": len(points.n),
        "measured": {
            k: [float(v.min()), float(v.max())]
            for k, v in (("flops", points.flops), ("N", points.n), ("D", points.d))
        },
        "converged": one.fit.converged,
        "gradient": one.fit.gradient,
        "starts": one.fit.starts,
        "starts_agreeing": one.fit.agreeing,
        "condition": one.fit.condition,
        "optimal": [_optimum(o) for o in one.optimal],
        "exponents": {
            "a": float(a),
            "b": float(b),
            "intervals": {"a": drawn.interval(a_all), "b": drawn.interval(b_all)},
        },
        "isoflop": _frontier(one.isoflop),
        "envelope": _frontier(one.envelope),
        "sensitivity": [
            {"left_out": k, "parameters": _parameters(one, law)} for k, law in one.sensitivity
        ],
        "period": None if one.period is None else asdict(one.period),
        "ill_conditioned": one.ill_conditioned,
        "flops_per_parameter_token": points.per_pair,
        "warnings": list(one.warnings),
    }
    return _finite(plain)


def families_to_plain(
    by: str, families: dict[str, Analysis], ratios: list[Multiplier]
) -> dict[str, Any]:
    """Several families: `by`, `families` (each as `to_plain`), and `multiplier`.

    A multiplier has reference, family, loss, value (FLOPs of the reference over those of the
    family), interval, and beyond (null, or the factor outside the measured compute).
    """
    each = {name: to_plain(one) for name, one in families.items()}
    return {"by": by, "families": each, "multiplier": _finite([asdict(m) for m in ratios])}


def print_fit(one: Analysis, console: Console) -> None:
    """Print the law, the budgets, the other approaches, the sensitivity and what is doubtful."""
    fitted, drawn, points = one.fit, one.bootstrap, one.points
    console.print(
        f"{points.source}: {len(points.n)} points, N {_range(points.n)}, D {_range(points.d)}, "
        f"{points.flops.min():.2g} to {points.flops.max():.2g} FLOPs"
    )
    last = "" if one.period is None else " + G log2(period)"
    console.print(f"L = E + A / N^alpha + B / D^beta{last}, nats per token")
    console.print(_laws(one))
    ended = "converged" if fitted.converged else "NOT converged"
    console.print(
        f"sum of Huber {fitted.objective:.6g} (delta {DELTA:g}, log loss); {ended}: "
        f"{fitted.agreeing} of {fitted.starts} starts agree, scaled gradient "
        f"{fitted.gradient:.0e}, condition {fitted.condition:.1e}"
    )
    console.print()
    console.print(_approaches(one))
    for name, found in (("isoFLOP", one.isoflop), ("envelope", one.envelope)):
        if found.reason:
            console.print(f"{name}: none; {found.reason}")
    if one.period is not None:
        console.print()
        console.print(_periods(one.period))
        console.print(
            f"loss: what a period costs beside period 1. worth: the share of "
            f"{one.period.flops:.2g} FLOPs with which period 1 reaches the same loss. residual: "
            f"mean of measured over fitted loss, less 1."
        )
    if one.optimal:
        console.print()
        console.print(_budgets(one))
    console.print(f"Intervals: {100 * drawn.level:g}% of {drawn.count} resamples of the runs.")
    for line in one.warnings:
        console.print(f"warning: {line}", style="yellow")
    if one.ill_conditioned:
        console.print(f"ill-conditioned: {one.ill_conditioned}", style="yellow")


def print_multipliers(ratios: list[Multiplier], console: Console) -> None:
    """Print the compute multiplier of each family at each loss."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss", "family", "compute multiplier", "interval", ""):
        table.add_column(column, justify="left" if column in ("family", "") else "right")
    for m in ratios:
        low, high = m.interval
        note = "" if m.beyond is None else f"{m.beyond:.3g}x outside the data"
        table.add_row(
            f"{m.loss:.3f}", m.family, f"{m.value:.3g}x", f"{low:.3g} to {high:.3g}", note
        )
    console.print(f"FLOPs of {ratios[0].reference} over FLOPs of the family, at equal loss:")
    console.print(table)


def _laws(one: Analysis) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in one.names:
        table.add_column(name, justify="right")
    laws = one.bootstrap.laws
    ends = [one.bootstrap.interval(getattr(laws, name)) for name in one.names]
    table.add_row("fit", *_cells(one, one.fit.law))
    table.add_row("low", *(f"{low:.4g}" for low, _ in ends))
    table.add_row("high", *(f"{high:.4g}" for _, high in ends))
    for k, law in one.sensitivity:
        table.add_row(f"without {k} largest", *_cells(one, law))
    return table


def _approaches(one: Analysis) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("exponents of", "N_opt: a", "interval", "D_opt: b", "interval"):
        table.add_column(column, justify="left" if column == "exponents of" else "right")
    drawn = one.bootstrap
    row = []
    for value, many in zip(one.fit.law.exponents, drawn.laws.exponents, strict=True):
        low, high = drawn.interval(many)
        row += [f"{float(value):.3f}", f"{low:.3f} to {high:.3f}"]
    table.add_row("parametric", *row)
    for name, found in (("isoFLOP", one.isoflop), ("envelope", one.envelope)):
        if found.a is not None:
            table.add_row(name, f"{found.a:.3f}", "", f"{found.b:.3f}", "")
    return table


def _periods(costs: PeriodCosts) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("periods of the levels", "mean", "runs", "loss", "interval", "worth", "interval")
    for column in (*columns, "residual", ""):
        table.add_column(column, justify="left" if column in (columns[0], "") else "right")
    for s in costs.settings:
        cells = [""] * 4
        if s.loss:
            low, high = s.loss_interval
            cells = [f"{s.loss:+.4f}", f"{low:+.4f} to {high:+.4f}"]
            low, high = s.worth_interval
            cells += [f"{s.worth:.1%}", f"{low:.1%} to {high:.1%}"]
        note = "" if s.beyond is None else f"{s.beyond:.3g}x outside the data"
        row = (s.periods or "", f"{s.period:.3g}", f"{s.runs}", *cells, f"{s.residual:+.2%}", note)
        table.add_row(*row)
    return table


def _budgets(one: Analysis) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("FLOPs", "N", "D", "loss"):
        table.add_column(column, justify="right")
    table.add_column("")
    for o in one.optimal:
        note = ", ".join(f"{name} {factor:.3g}x" for name, factor in o.beyond.items())
        if o.n is None or o.d is None or o.loss is None or o.intervals is None:
            table.add_row(f"{o.flops:.3g}", "", "", "", f"refused: outside the data by {note}")
            continue
        counts = [
            f"{human_count(value)} ({human_count(low)} to {human_count(high)})"
            for value, (low, high) in ((o.n, o.intervals["N"]), (o.d, o.intervals["D"]))
        ]
        low, high = o.intervals["loss"]
        loss = f"{o.loss:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(f"{o.flops:.3g}", *counts, loss, f"extrapolated: {note}" if note else "")
    return table


def _optimum(o: Optimum) -> dict[str, Any]:
    return {
        "flops": o.flops,
        "N": o.n,
        "D": o.d,
        "loss": o.loss,
        "intervals": o.intervals,
        "extrapolation": o.beyond or None,
        "refused": o.refused,
    }


def _frontier(found: Frontier) -> dict[str, Any]:
    minima = [
        {"flops": m.flops, "N": m.n, "D": m.d, "loss": m.loss, "points": m.points}
        for m in found.minima
    ]
    return {"a": found.a, "b": found.b, "minima": minima, "reason": found.reason}


def _parameters(one: Analysis, law: Law) -> dict[str, float]:
    return {name: float(getattr(law, name)) for name in one.names}


def _cells(one: Analysis, law: Law) -> list[str]:
    return [f"{float(getattr(law, name)):.4g}" for name in one.names]


def _range(values: Any) -> str:
    return f"{human_count(float(values.min()))} to {human_count(float(values.max()))}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
