"""`nlscale sweep`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nlscale.cli.arguments import add_cluster, number, whole
from nlscale.cluster.machines import UTILISATION
from nlscale.errors import TrainingFailed, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from nlscale.cluster.machines import Cluster
    from nlscale.scaling.compare.question import Question
    from nlscale.scaling.sweep.cost import Price
    from nlscale.scaling.sweep.runs import Run
    from nlscale.scaling.sweep.search import Choices
    from nlscale.scaling.sweep.spec import Search, Sweep
    from nlscale.scaling.sweep.status import Status

_FILE_WIDTH = 120  # columns, where there is no terminal to ask
_ASSUMED_VOCABULARY = 256  # that of bytes, where a script is printed far from the data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `sweep` takes; sets `func(args) -> int`."""
    parser.add_argument(
        "sweep",
        metavar="SWEEP",
        help="a YAML file of axes, or the name of one that comes with nlscale, such as quickstart",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only list the runs and what they cost; with --executor slurm, on standard error, "
        "and print the script of the array",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="local: processes on this machine (default); slurm: an array of jobs",
    )
    parser.add_argument(
        "--workers",
        type=whole(least=1, most=4096),
        metavar="N",
        help="runs at a time on this machine (default: the sweep's workers, or a GPU each, or a "
        "core each)",
    )
    add_cluster(parser, "price the sweep in GPU-hours of these machines (slurm needs them)")
    parser.add_argument(
        "--utilisation",
        type=number(),
        default=UTILISATION,
        metavar="SHARE",
        help="of the GPUs' peak that the price assumes (default: %(default)s)",
    )
    parser.add_argument(
        "--build-data",
        action="store_true",
        help="first run the commands of the sweep's build_data, which skip data that are there",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(func=_sweep)


@dataclass(frozen=True)
class _Asked:
    """What the command line says of every stage of a sweep."""

    args: argparse.Namespace
    cluster: Cluster | None
    price: Price | None
    scripts: bool
    """Print the script of an array instead of submitting it."""
    console: Console


def _sweep(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nlscale.cluster.machines import load_cluster
    from nlscale.scaling.sweep import search as searching
    from nlscale.scaling.sweep.build_data import build_missing
    from nlscale.scaling.sweep.cost import Price
    from nlscale.scaling.sweep.spec import read_sweep

    if args.executor == "slurm" and args.cluster is None:
        raise UserError("--executor slurm: give the machines as well, --cluster YAML")
    cluster = load_cluster(args.cluster) if args.cluster else None
    price = None
    if cluster and (args.executor == "local" or cluster.gpu_tflops):
        price = Price(cluster, args.utilisation)
    sweep = read_sweep(args.sweep)
    if sweep.ranks > 1 and args.executor == "slurm":
        raise UserError(
            f"{sweep.path}: ranks is {sweep.ranks}, and a task of --executor slurm is one process; "
            f"run the sweep on a machine, or launch its recipes one by one"
        )
    if args.imports:
        known = sweep.common.get("run.imports") or []
        if isinstance(known, list):  # else the recipe refuses it
            sweep.common["run.imports"] = [*known, *args.imports]
    scripts = args.dry_run and args.executor == "slurm" and not args.json
    console = Console(
        highlight=False,
        markup=False,
        stderr=args.json or scripts,
        width=None if sys.stdout.isatty() else _FILE_WIDTH,
    )
    asked = _Asked(args, cluster, price, scripts, console)
    if args.build_data and not args.dry_run:
        build_missing(sweep, lambda line: console.print(line, soft_wrap=True))
    search = sweep.search
    if search is None:
        last = _stage(asked, sweep)
        plain = last.plain
    else:
        found, searched = _search(asked, sweep, search)
        if found is not None and not args.dry_run:
            searching.finalists(sweep, search, found).write(sweep.folder)
        pick = partial(searching.goes_on, search, found, search.keep)
        last = _stage(asked, searching.finals_of(sweep, search), pick, waits=found is None)
        plain = last.plain | {"search": searched, "chosen": found}
    if sweep.compare is not None and all(state.finished for state in last.states.values()):
        try:
            plain["compared"] = _compare(sweep.compare, last, console, args.json)
        except UserError as error:  # what was trained is said all the same
            if args.json:
                print(json.dumps(plain | {"compared": {"error": str(error)}}, indent=1))
            raise
    if args.json:
        print(json.dumps(plain, indent=1))
    return 0


def _compare(question: Question, last: _Stage, console: Console, quiet: bool) -> dict[str, Any]:
    """What the runs say, as JSON; printed as well, unless that is all that is printed."""
    from nlscale.scaling.compare.answer import answer
    from nlscale.scaling.compare.show import print_answer, to_plain

    found = answer([run.folder for run in last.runs], question)
    if not quiet:
        console.print()
        print_answer(found, console)
    return to_plain(found)


def _search(asked: _Asked, sweep: Sweep, search: Search) -> tuple[Choices | None, dict[str, Any]]:
    """Search, round by round; what the last has found, None while it has not, and all as JSON."""
    from nlscale.scaling.sweep import search as searching
    from nlscale.scaling.sweep.listing import to_plain

    found: Choices | None = None
    runs: list[Run] = []
    states: dict[str, Status] = {}
    rounds = searching.rounds_of(sweep, search)
    for n, (one, most) in enumerate(zip(rounds, search.tried, strict=True), start=1):
        pick = partial(searching.goes_on, search, found, most)
        # once a round is over, what has not finished has diverged: nothing begins from it
        earlier = [run for run in runs if found is None or states[run.name].finished]
        stage = _stage(asked, one, pick, n > 1 and found is None, True, earlier)
        found = searching.choices(search, stage.runs, stage.states, stage.diverged)
        runs, states = [*runs, *stage.runs], states | stage.states
        said = [searching.waiting(search, n)] if found is None else []
        for line in said or searching.lines(search, found or {}, n):
            asked.console.print(line, soft_wrap=True)
    return found, to_plain(rounds[0], runs, states, asked.price) | {"failed": {}}


@dataclass(frozen=True)
class _Stage:
    """What became of the runs of a sweep, or of its search."""

    runs: list[Run]
    states: dict[str, Status]
    plain: dict[str, Any]
    """As JSON holds it."""
    diverged: list[str]
    """Names of runs of a search that gave up."""


def _stage(
    asked: _Asked,
    sweep: Sweep,
    pick: Callable[[Mapping[str, str]], bool] = lambda axes: True,
    waits: bool = False,
    search: bool = False,
    earlier: Sequence[Run] = (),
) -> _Stage:
    """List runs, and do what is still to do.

    Args:
        asked: by the command line.
        sweep: without a search.
        pick: whether a run is one, by the names of its values.
        waits: for something else; they are only listed.
        search: they choose a setting: one that diverges has found something.
        earlier: runs of stages before, from which these may begin.

    Raises:
        TrainingFailed: some have failed.
    """
    from nlscale.scaling.sweep.branches import share_stable_phases
    from nlscale.scaling.sweep.listing import print_sweep, to_plain
    from nlscale.scaling.sweep.runs import check_data, check_question, expand
    from nlscale.scaling.sweep.search import remember_diverged
    from nlscale.scaling.sweep.status import status

    args, console = asked.args, asked.console
    runs = expand(sweep, assumed=_ASSUMED_VOCABULARY if asked.scripts else None, wanted=pick)
    check_question(sweep, runs)
    states = {run.name: status(run) for run in runs}
    before = states | {run.name: status(run) for run in earlier}
    share_stable_phases(sweep, runs, before, earlier)
    workers = args.workers or sweep.workers
    if not (args.dry_run or waits):
        for line in check_data(sweep, runs):
            console.print(line, soft_wrap=True)
    if not args.json:
        print_sweep(sweep, runs, states, asked.price, workers, console)
    if asked.scripts and asked.cluster is not None and not waits:
        _print_script(sweep, runs, states, asked.cluster)
    failed: dict[str, str] = {}
    diverged = remember_diverged(sweep.folder, {}) if search else []
    todo = not all(state.finished or name in diverged for name, state in states.items())
    if todo and not (args.dry_run or waits):
        if args.executor == "slurm":
            assert asked.cluster is not None
            with contextlib.redirect_stdout(console.file):
                _submit(sweep, runs, states, asked.cluster)
        else:
            tried = [run for run in runs if run.name not in diverged]
            failed = _run_here(sweep, tried, states, workers, console)
            states = {run.name: status(run) for run in runs}
    if search:
        diverged = remember_diverged(sweep.folder, failed)
        for name in (name for name in diverged if name in states):
            console.print(f"diverged: {name}", style="yellow", soft_wrap=True)
        failed = {name: why for name, why in failed.items() if name not in diverged}
    plain = to_plain(sweep, runs, states, asked.price) | {"failed": failed}
    if failed:
        if args.json:
            print(json.dumps(plain, indent=1))
        for name, reason in failed.items():
            console.print(f"failed: {name}: {reason}", style="bold red", soft_wrap=True)
        raise TrainingFailed(
            f"{len(failed)} of {len(runs)} runs failed; mend that, and the same command runs only "
            f"what is missing"
        )
    return _Stage(runs, states, plain, diverged)


def _run_here(
    sweep: Sweep,
    runs: list[Run],
    states: dict[str, Status],
    workers: int | None,
    console: Console,
) -> dict[str, str]:
    from nlscale.scaling.sweep.board import Board
    from nlscale.scaling.sweep.local import only_sweep, run_local, worker_places

    with only_sweep(sweep.folder) as owned:
        places = worker_places(workers, sweep.ranks)
        console.print()
        with Board(runs, states, len(places), console) as board:
            failed = run_local(runs, states, places, sweep.ranks, board, owned)
    if not failed:
        console.print(sweep.when_finished, soft_wrap=True)
    return failed


def _submit(sweep: Sweep, runs: list[Run], states: dict[str, Status], cluster: Cluster) -> None:
    from nlscale.cluster.launch.slurm import check_array, submit_array
    from nlscale.scaling.sweep.local import only_sweep
    from nlscale.scaling.sweep.slurm import write_commands

    check_array(cluster, sweep.path.stem, sweep.folder.resolve())
    with only_sweep(sweep.folder):
        submit_array(write_commands(sweep, runs, states), cluster, sweep.path.stem)


def _print_script(
    sweep: Sweep, runs: list[Run], states: dict[str, Status], cluster: Cluster
) -> None:
    """Print the batch script of what is still to do; what could not be checked goes to stderr."""
    from nlscale.cluster.launch.batch import array_script
    from nlscale.cluster.launch.script import print_script
    from nlscale.data import read_index
    from nlscale.scaling.sweep.slurm import command_lines

    for data in dict.fromkeys(data for run in runs for data in run.config.data.folders()):
        try:
            read_index(data)
        except UserError as error:
            print(
                f"nlscale: warning: {error}. Not checked: the data; sizes are those of "
                f"{_ASSUMED_VOCABULARY} token ids where model.vocabulary is null",
                file=sys.stderr,
            )
    if lines := command_lines(runs, states):
        folder = sweep.folder.resolve()
        print_script(array_script(cluster, sweep.path.stem, len(lines), folder))
