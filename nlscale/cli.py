"""`nlscale ...`: one subcommand a verb, each a few lines that call a room.

Exit codes: 0 done, 2 something to mend in what was asked (one line says what), 3 the training
failed, 4 a job gave up after restarts without progress, 5 a rank was lost or hung, 75 stopped on
request with a checkpoint, 130 interrupted, 1 anything else (with a traceback).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings

from nlscale import __version__
from nlscale.errors import SaidElsewhere, UserError

_OTHERS_WAIT_SECONDS = 3.0


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit."""
    args = _parse(argv)
    # megatron-core announces at import, on every rank, which optional packages it does without.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        sys.exit(args.func(args))
    except SaidElsewhere as error:
        sys.exit(error.exit_code)
    except UserError as error:
        if error.told or _speaks_for_its_node():
            print(f"nlscale: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("nlscale: interrupted", file=sys.stderr)
        sys.exit(130)


def _speaks_for_its_node() -> bool:
    """Whether this process says what failed before the ranks had met.

    Ranks of a node fail alike then, and cannot agree on who says so: the first does. torchrun ends
    the others when it has; what only they have to say is said a little later.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(_OTHERS_WAIT_SECONDS)
    return "TORCHELASTIC_RUN_ID" in os.environ


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes no more positional arguments once an option has come between them.
    if any(text.startswith("-") for text in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlscale",
        description="Pretrain Hope / Nested-Learning models, whose levels update at different "
        "periods.",
    )
    parser.add_argument("--version", action="version", version=f"nlscale {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = verbs.add_parser(
        "train",
        help="train a model from a recipe",
        description="Train a model from a recipe, in this process or, started by torchrun, as one "
        "of its ranks. `nlscale config --keys` lists the keys of a recipe.",
    )
    _add_recipe(train)
    train.set_defaults(func=_train)

    config = verbs.add_parser(
        "config",
        help="show and explain a configuration",
        description="Print the configuration that a recipe and overrides give, after checking its "
        "keys and types.",
    )
    _add_recipe(config, optional=True)
    config.add_argument(
        "--explain",
        metavar="KEY",
        help="print only this key: its value, where the value came from, and what it means",
    )
    config.add_argument(
        "--keys", action="store_true", help="list every key with its default and meaning"
    )
    config.set_defaults(func=_config)

    from nlscale.data.cli import add_arguments

    add_arguments(
        verbs.add_parser(
            "data",
            help="build and inspect token shards",
            description="Build and inspect the token shards that training reads.",
        )
    )
    figure = verbs.add_parser(
        "figure",
        help="draw the loss of one run, or compare several",
        description="Draw the loss of one run, or the validation loss of several in one figure, "
        "from their metrics.jsonl.",
    )
    figure.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    figure.add_argument(
        "--out",
        metavar="PNG",
        help="the file to write (default: RUN/loss.png, or comparison.png for several runs)",
    )
    figure.set_defaults(func=_figure)

    from nlscale.bench.cli import add_arguments as add_bench
    from nlscale.plan.cli import add_arguments as add_plan

    plan = verbs.add_parser(
        "plan",
        help="what a recipe will send between the nodes of a cluster",
        description="Parameters, updates and inter-node traffic of each level on a cluster, beside "
        "plain data parallel; neither GPUs nor data are needed.",
    )
    _add_recipe(plan)
    add_plan(plan)
    add_bench(
        verbs.add_parser(
            "bench",
            help="measure what the plan promises",
            description="Measurements on this machine.",
        )
    )
    from nlscale.launch.cli import add_arguments as add_launch

    add_launch(
        verbs.add_parser(
            "launch",
            help="start a run on a cluster, through Slurm or torchrun",
            description="Start a run on the nodes of a cluster file, after checking that it fits.",
        ),
        _add_recipe,
    )
    from nlscale.checkpoint.cli import add_arguments as add_checkpoint

    add_checkpoint(
        verbs.add_parser(
            "checkpoint",
            help="list, inspect, verify, compare and export checkpoints",
            description="Look at the checkpoints of a run, prove them whole, compare them, and "
            "export their weights.",
        )
    )
    from nlscale.verify.cli import add_arguments as add_verify

    verify = verbs.add_parser(
        "verify-resume",
        help="prove that a run that is killed and resumed is the run that never stopped",
        description="Train without a stop; train again, kill it after the checkpoint at a step, "
        "resume it on the same layout of ranks and on others; compare.",
    )
    _add_recipe(verify)
    add_verify(verify)
    from nlscale.doctor.cli import add_arguments as add_doctor

    add_doctor(
        verbs.add_parser(
            "doctor",
            help="say what is wrong with this machine, or with several nodes",
            description="Check versions, GPUs, limits, addresses, disk and data of this machine; "
            "with --nodes, started on every rank, also what the nodes share: bandwidth, latency, "
            "clocks, folders. Says what to do about each finding. Exit code 2 if one is an error.",
        )
    )
    from nlscale.scaling.cli import add_arguments as add_fit

    add_fit(
        verbs.add_parser(
            "fit",
            help="fit a scaling law to runs, and say what a budget buys",
            description="Fit L = E + A / N^alpha + B / D^beta to finished runs or a CSV file, with "
            "bootstrap intervals, compute-optimal sizes and a figure.",
        )
    )
    from nlscale.scaling.sweep.cli import add_arguments as add_sweep

    add_sweep(
        verbs.add_parser(
            "sweep",
            help="train many runs from one file: sizes, lengths, mixers, seeds",
            description="List the runs that a file of axes gives, with what they cost, and train "
            "those that have not finished. The same command goes on where it was stopped.",
        )
    )
    return parser


def _add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "recipe",
        nargs="?" if optional else None,
        metavar="RECIPE",
        help="a YAML file of keys, such as recipes/quickstart.yaml",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="a key to set otherwise than the recipe, such as train.steps=100",
    )


def _train(args: argparse.Namespace) -> int:
    from nlscale import recipe
    from nlscale.checks import prepare
    from nlscale.signals import StopSignals

    with StopSignals() as signals:
        config = recipe.load(args.recipe, args.overrides).config
        prepared = prepare(config)
        from nlscale.train import train  # imports torch: only what has been checked waits for it

        train(config, prepared, signals)
    return 0


def _config(args: argparse.Namespace) -> int:
    import yaml

    from nlscale import recipe

    if args.keys:
        print(recipe.describe_keys())
        return 0
    if args.recipe is None:
        raise UserError("give a recipe, for example: nlscale config recipes/quickstart.yaml")
    loaded = recipe.load(args.recipe, args.overrides)
    if args.explain:
        print(recipe.explain(loaded, args.explain))
    else:
        print(yaml.safe_dump(recipe.to_plain(loaded.config), sort_keys=False), end="")
    return 0


def _figure(args: argparse.Namespace) -> int:
    from pathlib import Path

    from nlscale.figures import draw_comparison, draw_loss

    runs = [Path(run) for run in args.runs]
    if len(runs) == 1:
        print(draw_loss(runs[0], Path(args.out) if args.out else None))
    else:
        out = Path(args.out or "comparison.png")
        print(draw_comparison({run.name: run for run in runs}, out))
    return 0
