"""`nlscale ...`: one subcommand a verb, each a few lines that call a room.

Exit codes: 0 done, 2 something to mend in what was asked (one line says what), 3 the training
failed, 1 anything else (with a traceback).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from nlscale import __version__
from nlscale.errors import UserError

_OVERRIDES = "KEY=VALUE"


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit."""
    args = _parser().parse_args(argv)
    # megatron-core announces at import, on every rank, which optional packages it does without.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        sys.exit(args.func(args))
    except UserError as error:
        # Ranks of a node that fail alike say so once.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"nlscale: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("nlscale: interrupted", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlscale",
        description="Pretrain Hope / Nested-Learning models: parts that update at different periods.",
    )
    parser.add_argument("--version", action="version", version=f"nlscale {__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = verbs.add_parser(
        "train",
        help="train a model from a recipe",
        description="Train as a recipe says. Under torchrun every rank runs this command; "
        "without it, it is one process. `nlscale config --keys` lists the keys.",
    )
    _add_recipe(train)
    train.set_defaults(func=_train)

    config = verbs.add_parser(
        "config",
        help="show, explain and check a configuration",
        description="Print the configuration that a recipe and overrides give.",
    )
    _add_recipe(config, optional=True)
    config.add_argument(
        "--explain",
        metavar="KEY",
        help="say what a key means, its value, and where the value came from",
    )
    config.add_argument("--keys", action="store_true", help="list every key with its meaning")
    config.set_defaults(func=_config)

    from nlscale.data.cli import add_arguments

    add_arguments(
        verbs.add_parser(
            "data", help="build and inspect token shards", description="Token shards on disk."
        )
    )
    figure = verbs.add_parser(
        "figure",
        help="draw the loss of one run, or compare several",
        description="Draw loss.png of a run from its metrics.jsonl, or validation curves of several.",
    )
    figure.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    figure.add_argument("--out", metavar="PNG", help="where to write (default: RUN/loss.png)")
    figure.set_defaults(func=_figure)
    return parser


def _add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "recipe", nargs="?" if optional else None, metavar="RECIPE", help="a YAML file of keys"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar=_OVERRIDES, help="for example train.steps=100"
    )


def _train(args: argparse.Namespace) -> int:
    from nlscale import recipe

    loaded = recipe.load(args.recipe, args.overrides)
    from nlscale.train import train  # imports torch: only after the recipe is known to be good

    train(loaded.config)
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
