"""`nlscale bench sync|checkpoint|coords`; others are in `bench_data`, `_device` and `_speed`."""

from __future__ import annotations

import argparse
import json
import os
import sys

from nlscale.cli import bench_data, bench_device, bench_speed
from nlscale.cli.arguments import add_recipe, config_of, figure, path, whole
from nlscale.cluster.life.place import alone, place
from nlscale.errors import UserError

DEFAULT_RECIPE = "bench-sync"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang the sub-parsers under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    sync = verbs.add_parser(
        "sync",
        help="bytes between emulated nodes, against the plan",
        description="Train a small model on emulated nodes (network namespaces of this machine) "
        "with and without deferral and staggering, and compare the bytes that leave a node with "
        "what `nlscale plan` says. Needs root, and ip and tc of iproute2.",
    )
    sync.add_argument(
        "--recipe", default=DEFAULT_RECIPE, metavar="YAML", help="default: %(default)s"
    )
    sync.add_argument("--nodes", type=whole(), default=2, metavar="N", help="default: %(default)s")
    sync.add_argument(
        "--ranks-per-node", type=whole(), default=2, metavar="N", help="default: %(default)s"
    )
    sync.add_argument(
        "--rate",
        default="200mbit",
        metavar="RATE",
        help="what a node can send, in the units of tc (default: %(default)s)",
    )
    sync.add_argument(
        "--steps",
        type=whole(),
        metavar="N",
        help="steps to measure, whole cycles of the periods (default: one cycle, at least 16)",
    )
    sync.add_argument("--json", action="store_true", help="print JSON instead of a table")
    sync.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a recipe's key")
    sync.set_defaults(func=_sync)

    bench_data.add_arguments(verbs)
    bench_device.add_arguments(verbs)
    bench_speed.add_arguments(verbs)
    checkpoint = verbs.add_parser(
        "checkpoint",
        help="what saving costs a run, and loading",
        description="Save checkpoints of a recipe's model after steps on random tokens, on this "
        "process or, under torchrun, on all of them: how long training waits, how long writing, "
        "verifying and loading take, and the size on the disk against that of the state.",
    )
    add_recipe(checkpoint)
    checkpoint.add_argument(
        "--steps",
        type=whole(),
        default=5,
        metavar="N",
        help="steps to time before the first save (default: %(default)s)",
    )
    checkpoint.add_argument(
        "--out",
        type=path,
        metavar="FOLDER",
        help="write and keep the checkpoints there (default: a temporary folder beside run.dir)",
    )
    checkpoint.add_argument("--json", action="store_true", help="print JSON instead of text")
    checkpoint.set_defaults(func=_checkpoint)

    coords = verbs.add_parser(
        "coords",
        help="whether activations keep their size in wider models",
        description="Coordinate check: train a model at several widths for a few steps, in the "
        "standard parametrisation and by muP (model.mup_base_width), on random tokens and one "
        "process, and print how the size of each kind of activation, and of its change, grows "
        "with the width: not at all, where hyperparameters carry over from one width to another.",
    )
    coords.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | KEY=VALUE",
        help="a YAML file of keys, or the name of one that comes with nlscale (default: a small "
        "Hope), and overrides of its keys",
    )
    coords.add_argument(
        "--widths",
        type=whole(),
        nargs="+",
        default=[64, 128, 256, 512],
        metavar="N",
        help="values of model.d_model, at the recipe's head size (default: 64 128 256 512)",
    )
    coords.add_argument(
        "--steps",
        type=whole(),
        default=4,
        metavar="N",
        help="steps to train (default: %(default)s)",
    )
    coords.add_argument("--json", action="store_true", help="print JSON instead of tables")
    coords.add_argument(
        "--figure", type=figure, metavar="FILE", help="draw it too: .png, .svg, .pdf"
    )
    coords.set_defaults(func=_coords)


def _sync(args: argparse.Namespace) -> int:
    from nlscale.bench.modes import prepare
    from nlscale.bench.netns import EmulatedNodes

    alone("bench sync")
    if args.nodes < 2 or args.ranks_per_node < 1:
        raise UserError("bench sync needs --nodes 2 or more and --ranks-per-node 1 or more")
    config = config_of(args)
    nodes = EmulatedNodes(args.nodes, args.rate)
    bench = prepare(config, nodes, args.ranks_per_node, args.steps)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # emulated nodes speak gloo
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # addresses in there have no names
    from nlscale.bench.sync import measure, print_result  # imports torch: only once all is well

    result = measure(bench)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print_result(result)
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    from nlscale.plan.checks import check_sizes

    if args.steps < 1:
        raise UserError(f"--steps {args.steps} is less than 1")
    config = config_of(args)
    check_sizes(config, place().world)
    from nlscale.bench.checkpoint import bench_checkpoint, print_result  # imports torch

    result = bench_checkpoint(config, args.steps, args.out)
    if place().rank == 0:
        if args.json:
            print(json.dumps(result, indent=1))
        else:
            print_result(result)
    return 0


def _coords(args: argparse.Namespace) -> int:
    from nlscale.config import recipe

    if args.steps < 1:
        raise UserError(f"--steps {args.steps} is less than 1")
    alone("bench coords")
    is_recipe = bool(args.words) and "=" not in args.words[0]
    from nlscale.bench.coords import SMALL_MODEL, check_coordinates, print_result  # imports torch

    path, overrides = (args.words[0], args.words[1:]) if is_recipe else (None, args.words)
    given = [] if is_recipe else SMALL_MODEL
    config = recipe.load(path, [*given, *overrides], trusted=True).config
    result = check_coordinates(
        config, args.widths, args.steps, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print_result(result)
    if args.figure is not None:
        from nlscale.bench.coords_figure import draw_coordinates

        print(f"figure: {draw_coordinates(result, args.figure)}", file=sys.stderr)
    return 0
