"""`nlscale ...`: one subcommand a verb; each is a file of this folder that calls a room."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple, NoReturn

from nlscale import __version__
from nlscale.cli import (
    bench,
    checkpoint,
    compare,
    config,
    continual,
    data,
    doctor,
    eval,
    figure,
    fit,
    generate,
    launch,
    plan,
    recipe,
    sweep,
    train,
    verify,
)
from nlscale.cli.options import unknown_option
from nlscale.cluster.life.exits import exit_with, quiet
from nlscale.cluster.life.place import alone
from nlscale.cluster.life.signals import ends_as_interrupted
from nlscale.config.extensions import import_all
from nlscale.errors import UserError


class _Verb(NamedTuple):
    name: str
    module: ModuleType
    """Its `add_arguments(parser)` adds what the verb takes and sets `func(args) -> int`."""
    help: str
    description: str
    output_is_result: bool = True
    """What it prints is what it is called for; the result of a run lies in a folder."""
    stops_itself: bool = False
    """Its room hears the signals that ask to stop, and has something to save."""
    one_process: bool = False
    """It starts ranks of its own, and so must not be one of several."""


_VERBS = (
    _Verb(
        "train",
        train,
        "train a model from a recipe",
        "Train a model from a recipe, in this process or, started by torchrun, as one of its "
        "ranks. `nlscale config --keys` lists the keys of a recipe.",
        output_is_result=False,
        stops_itself=True,
    ),
    _Verb(
        "config",
        config,
        "show and explain a configuration",
        "Print the configuration that a recipe and overrides give, after checking its keys and "
        "types.",
    ),
    _Verb(
        "recipe",
        recipe,
        "list, show and copy the recipes that come with nlscale",
        "The recipes, cluster, sweep and stream files that come with nlscale, by name.",
    ),
    _Verb(
        "data",
        data,
        "build and inspect token shards",
        "Build and inspect the token shards that training reads.",
    ),
    _Verb(
        "eval",
        eval,
        "ask trained models: loss by position, needles, tasks, lm-evaluation-harness",
        "Ask one or several trained models a question, and print an interval beside every figure. "
        "Results are kept: asked again they are there at once, and a killed command goes on.",
    ),
    _Verb(
        "generate",
        generate,
        "let a trained model go on with a text",
        "Let a trained model go on with a text, sampling token by token. The same command gives "
        "the same text; --seed gives others. With --state the model goes on later from where it "
        "was, without reading again.",
    ),
    _Verb(
        "figure",
        figure,
        "draw the loss of one run, or compare several",
        "Draw the loss of one run, or the validation loss of several in one figure, from their "
        "metrics.jsonl.",
    ),
    _Verb(
        "plan",
        plan,
        "what a recipe will send between the nodes of a cluster",
        "Parameters, updates and inter-node traffic of each level on a cluster, beside plain data "
        "parallel; neither GPUs nor data are needed.",
    ),
    _Verb(
        "bench",
        bench,
        "measure what the plan promises",
        "Measurements on this machine.",
    ),
    _Verb(
        "launch",
        launch,
        "start a run on a cluster, through Slurm or torchrun",
        "Start a run on the nodes of a cluster file, after checking that it fits.",
    ),
    _Verb(
        "checkpoint",
        checkpoint,
        "list, inspect, verify, compare and export checkpoints",
        "Look at the checkpoints of a run, prove them whole, compare them, and export their "
        "weights.",
    ),
    _Verb(
        "verify-resume",
        verify,
        "prove that a run that is killed and resumed is the run that never stopped",
        "Train without a stop; train again, kill it after the checkpoint at a step, resume it on "
        "the same layout of ranks and on others; compare.",
        one_process=True,
    ),
    _Verb(
        "doctor",
        doctor,
        "say what is wrong with this machine, or with several nodes",
        "Check versions, GPUs, limits, addresses, disk and data of this machine; with --nodes, "
        "started on every rank, also what the nodes share: bandwidth, latency, clocks, folders. "
        "Says what to do about each finding. Exit code 2 if one is an error.",
    ),
    _Verb(
        "fit",
        fit,
        "fit a scaling law to runs, and say what a budget buys",
        "Fit L = E + A / N^alpha + B / D^beta to finished runs or a CSV file, with bootstrap "
        "intervals, compute-optimal sizes and a figure.",
    ),
    _Verb(
        "compare",
        compare,
        "say whether runs differ by more than their seeds do",
        "Compare finished runs by a key of their recipes, in pairs of one seed: differences with "
        "intervals, undecided where they are, and how many more seeds would decide.",
    ),
    _Verb(
        "sweep",
        sweep,
        "train many runs from one file: sizes, lengths, mixers, seeds",
        "List the runs that a file of axes gives, with what they cost, and train those that have "
        "not finished. The same command goes on where it was stopped.",
        stops_itself=True,
        one_process=True,
    ),
    _Verb(
        "continual",
        continual,
        "learn tasks one after the other, and measure what is forgotten",
        "Train the runs of a stream file: tasks in order, under each of its methods, with each "
        "seed. Print the matrix of the scores of every task after every task, forgetting and "
        "transfer. The same command goes on where it was stopped.",
        stops_itself=True,
        one_process=True,
    ),
)


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit."""
    asked: list[_Verb] = []

    def work() -> int:
        quiet()
        imports, rest = _imports(argv)
        # Before anything is parsed: what `nlscale eval` can be asked is what they have added.
        with ends_as_interrupted():
            import_all(imports)
        args = _parse(rest, imports)
        verb = next(verb for verb in _VERBS if verb.name == args.command)
        asked.append(verb)
        with nullcontext() if verb.stops_itself else ends_as_interrupted():
            if verb.one_process:
                alone(f"nlscale {verb.name}")
            return args.func(args)

    exit_with(work, output_is_result=lambda: all(verb.output_is_result for verb in asked))


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as every error is said. Its sub-parsers do, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(UserError.exit_code, f"nlscale: {message}; `{self.prog} --help` says more\n")


def _imports(argv: list[str] | None) -> tuple[list[str], list[str]]:
    """The modules that `--import` names, before or after the verb, and the other arguments."""
    anywhere = _Parser(prog="nlscale", add_help=False, allow_abbrev=False)
    _add_import(anywhere)
    found, others = anywhere.parse_known_args(argv)
    return found.imports, others


def _parse(argv: list[str], imports: Sequence[str] = ()) -> argparse.Namespace:
    parser = _parser()
    wrong = unknown_option(parser, argv, ["--import"])
    if wrong is not None:  # before argparse misses what was meant by it
        command, said = wrong
        command.error(said)
    args, rest = parser.parse_known_args(argv)
    # argparse takes no more positional arguments once an option has come between them.
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    args.imports = list(imports)
    if args.imports and "overrides" in args:  # what starts the recipe elsewhere passes it on
        args.overrides.append(f"run.imports=[{','.join(args.imports)}]")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nlscale",
        allow_abbrev=False,
        description="Pretrain Hope / Nested-Learning models, whose levels update at different "
        "periods.",
    )
    parser.add_argument("--version", action="version", version=f"nlscale {__version__}")
    _add_import(parser)
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for verb in _VERBS:
        one = verbs.add_parser(verb.name, help=verb.help, description=verb.description)
        verb.module.add_arguments(one)
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="with any command: first import a Python module that adds mixers, optimizer rules or "
        "evaluations, beside those of a recipe's run.imports",
    )
