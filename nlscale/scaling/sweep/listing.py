"""A sweep as a table and as JSON: what it trains, what that costs, what has become of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.config.units import human_count
from nlscale.scaling.sweep.cost import Price, Speeds, eta
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.spec import Sweep
from nlscale.scaling.sweep.status import Status
from nlscale.telemetry.terminal import duration, loss_text

States = Mapping[str, Status]


def print_sweep(
    sweep: Sweep,
    runs: list[Run],
    states: States,
    price: Price | None,
    workers: int | None,
    out: Console,
) -> None:
    """Print the table of runs and what they cost together.

    Args:
        sweep: as read.
        runs: of it.
        states: where they stand, by name.
        price: None: hours of this machine, where they are known.
        workers: runs at a time on this machine; None: not known yet.
        out: where to.
    """
    speeds = Speeds.measured(runs, states)
    out.print(f"{sweep.path}: {len(runs)} runs in {sweep.folder}", soft_wrap=True)
    out.print()
    out.print(_table(runs, states, price, speeds))
    out.print()
    total, alone = sum(r.flops for r in runs), sum(r.tokens * r.flops_per_token for r in runs)
    shared = 1 - total / alone
    line = f"{flops_text(total)} FLOPs"
    if shared > 0:
        line += f", {shared:.0%} less than if no run began from another"
    out.print(f"{line}.")
    if price is not None:
        _print_price(price, total, out)
    else:
        steps = {name: state.step for name, state in states.items()}
        left = eta(runs, steps, speeds, workers or 1)
        if all(state.finished for state in states.values()):
            out.print(sweep.when_finished, soft_wrap=True)
        elif left is None:
            out.print("Hours are known once a run has finished.")
        else:
            out.print(
                f"About {duration(left)} to go with {workers or 1} at a time, as measured here."
            )


def to_plain(sweep: Sweep, runs: list[Run], states: States, price: Price | None) -> dict[str, Any]:
    """The sweep as JSON holds it.

    Keys:
        sweep, dir: the file and the folder.
        flops: of all runs, what they share counted once; flops_alone: if no run began from another.
        price: null, or cluster, gpu_tflops, utilisation, gpu_hours of all, hours on all its GPUs.
        runs: one a run: name, axes (`search.round` among them in later rounds of a search), dir,
            parameters, non_embedding_parameters, tokens, steps, flops (its own), begins_from (null
            or a run), begins_at_step, gpu_hours (null without a cluster), estimated_hours (null
            until measured), state (`finished`, `begun`, `to do`), step and val_loss (nats per
            token, null until finished).

    `nlscale sweep` adds `failed`: why, of each run that failed, by name.
    """
    speeds = Speeds.measured(runs, states)
    total = sum(run.flops for run in runs)
    return {
        "sweep": str(sweep.path),
        "dir": str(sweep.folder),
        "flops": total,
        "flops_alone": sum(run.tokens * run.flops_per_token for run in runs),
        "price": None
        if price is None
        else {
            "cluster": price.cluster.name,
            "gpu_tflops": price.cluster.gpu_tflops,
            "utilisation": price.utilisation,
            "gpu_hours": price.gpu_hours(total),
            "hours": price.gpu_hours(total) / price.cluster.ranks,
        },
        "runs": [_run(run, states[run.name], price, speeds) for run in runs],
    }


def flops_text(flops: float) -> str:
    """FLOPs in three figures: 1.26e19."""
    mantissa, exponent = f"{flops:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _run(run: Run, state: Status, price: Price | None, speeds: Speeds) -> dict[str, Any]:
    seconds = speeds.seconds(run, run.flops)
    return {
        "name": run.name,
        "axes": run.axes,
        "dir": str(run.folder),
        "parameters": run.parameters,
        "non_embedding_parameters": run.non_embedding,
        "tokens": run.tokens,
        "steps": run.steps,
        "flops": run.flops,
        "begins_from": run.start.name if run.start else None,
        "begins_at_step": run.start_step,
        "gpu_hours": price.gpu_hours(run.flops) if price else None,
        "estimated_hours": None if seconds is None else seconds / 3600,
        "state": state.word,
        "step": state.step,
        "val_loss": (state.summary or {}).get("final_val_loss"),
    }


def _table(runs: list[Run], states: States, price: Price | None, speeds: Speeds) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("\nrun", no_wrap=True)
    shares = any(run.start for run in runs)
    columns = ["\nparameters", "without\nembedding", "\ntokens", "\nsteps"]
    columns += ["begins\nat step"] * shares
    columns += ["\nFLOPs", "\nGPU-hours" if price else "\ntime", "validation\nloss"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        state = states[run.name]
        cells = [
            human_count(run.parameters),
            human_count(run.non_embedding),
            human_count(run.tokens),
            f"{run.steps:,}",
        ]
        if shares:
            cells.append(f"{run.start_step + 1:,}")
        seconds = speeds.seconds(run, run.flops)
        time = "-" if seconds is None else duration(seconds)
        cells += [
            flops_text(run.flops),
            human_count(price.gpu_hours(run.flops)) if price else time,
            _outcome(run, state),
        ]
        table.add_row(run.name, *cells)
    return table


def _outcome(run: Run, state: Status) -> str:
    if state.summary is not None:
        return loss_text(state.summary["final_val_loss"])
    return f"{state.step / run.steps:.0%} done" if state.step else "-"


def _print_price(price: Price, flops: float, out: Console) -> None:
    cluster, hours = price.cluster, price.gpu_hours(flops)
    out.print(
        f"{human_count(hours)} GPU-hours; on all {cluster.ranks} GPUs of {cluster.name} "
        f"{duration(3600 * hours / cluster.ranks)}. Assumed: {price.utilisation:.0%} of "
        f"{cluster.gpu_tflops:g} TFLOP/s, the bf16 peak of a GPU (--utilisation).",
        soft_wrap=True,
    )
