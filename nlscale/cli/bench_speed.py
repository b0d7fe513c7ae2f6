"""`nlscale bench scan|layer|optimizer|tiers|step|train`: how fast, from kernel to training step."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nlscale.cli.arguments import add_recipe, config_of, path, whole
from nlscale.cluster.life.place import alone, place
from nlscale.config.choices import Tier
from nlscale.errors import UserError

if TYPE_CHECKING:
    from nlscale.config.vocabulary import Config

_SCANNED = ["hope", "gated-delta", "hope-pure", "attention"]
_COMPARED = ["hope", "gated-delta", "attention"]
_UPDATED = ["quickstart", "model.vocabulary=256"]
_STREAMED = [*_UPDATED, "optimizer.rule=adamw", "tiers.ring_mib=1"]


def add_arguments(verbs: Any) -> None:
    """Hang the sub-parsers under `verbs`; each sets `func(args) -> int`."""
    _add_scan(verbs)
    layer = verbs.add_parser(
        "layer",
        help="time one block of each mixer",
        description="Time one block of a recipe's size, forward and backward, with each mixer, and "
        "its mixer alone, on one micro batch and one process.",
    )
    add_recipe(layer)
    _add_mixers(layer, _COMPARED)
    _add_repeats(layer)
    layer.add_argument("--json", action="store_true", help="print JSON instead of a table")
    layer.set_defaults(func=_layer)

    _add_optimizer(verbs)
    _add_tiers(verbs)
    step = verbs.add_parser(
        "step",
        help="tokens a second of whole training steps",
        description="Time whole training steps of a recipe on random tokens, on this process or, "
        "under torchrun, on all of them; prints JSON.",
    )
    add_recipe(step)
    _add_steps(step)
    step.set_defaults(func=_step)

    train = verbs.add_parser(
        "train",
        help="whole training steps of each mixer, and of plain torch",
        description="Time whole training steps of a recipe with each mixer, on random tokens, on "
        "this process or, under torchrun, on all of them; beside attention, on one process, also "
        "a Transformer of its size in torch alone, compiled on a GPU. Speeds, their ratio to "
        "attention's, peak memory, and MFU: model FLOPs over the measured rate of a large matrix "
        "product.",
    )
    add_recipe(train)
    _add_mixers(train, _COMPARED)
    _add_steps(train)
    train.add_argument(
        "--trace",
        type=path,
        metavar="FILE",
        help="also write a torch profiler trace of two steps of the first mixer (for Perfetto or "
        "chrome://tracing), and print its five largest costs",
    )
    train.add_argument("--json", action="store_true", help="print JSON instead of a table")
    train.set_defaults(func=_train)


def _add_scan(verbs: Any) -> None:
    scan = verbs.add_parser(
        "scan",
        help="time the memory scan, check its kernels on this device, or compile them for another",
        description="Time the memory scan of each mixer, forward and backward, by the fused "
        "kernels (GPU, bf16) and in torch, beside softmax attention (SDPA) of the same shape and "
        "beside floors: FLOPs over the measured rate of a matrix product, bytes over that of a "
        "copy. --check compares reads and gradients with a float64 reference instead: run it once "
        "on every kind of GPU and version of Triton before training there. --compiled says what "
        "the compiler makes of the kernels, and needs no GPU.",
    )
    scan.add_argument(
        "--sizes",
        nargs="+",
        metavar="BxTxHxD",
        help="sequences, tokens, heads and dimension of a head (default: 8x4096x16x64 "
        "2x16384x16x64 8x4096x8x128; on a CPU 1x256x2x32; with --compiled the first and last)",
    )
    scan.add_argument(
        "--chunk", type=whole(), default=64, metavar="N", help="a chunk's tokens (default: 64)"
    )
    scan.add_argument(
        "--mixers",
        nargs="+",
        metavar="MIXER",
        help=f"values of model.mixer (default: {' '.join(_SCANNED)}; --compiled leaves out "
        f"attention, which is not a kernel of nlscale)",
    )
    _add_repeats(scan)
    instead = scan.add_mutually_exclusive_group()
    instead.add_argument(
        "--check",
        action="store_true",
        help="print the errors of all sizes that the kernels take, as JSON, and fail if one is "
        "out of bounds",
    )
    instead.add_argument(
        "--compiled",
        metavar="TARGET",
        help="compile the kernels for sm_80, sm_90 or sm_100 as training launches them, print "
        "registers, spills, shared memory and programs a multiprocessor, and fail if one does not "
        "fit",
    )
    scan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    scan.set_defaults(func=_scan)


def _add_optimizer(verbs: Any) -> None:
    optimizer = verbs.add_parser(
        "optimizer",
        help="an update by each optimizer rule, beside one by adamw",
        description="Time updates of all parameters of a model by each optimizer rule, in turn "
        "with adamw, on random gradients and one process: what a run of several ranks shares "
        "among them. A level's own rule is left out of account.",
    )
    optimizer.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | KEY=VALUE",
        help=f"a YAML file of keys, or the name of one that comes with nlscale (default: "
        f"{' '.join(_UPDATED)}), and overrides of its keys",
    )
    optimizer.add_argument(
        "--rules",
        nargs="+",
        metavar="RULE",
        help="values of optimizer.rule (default: all but adamw)",
    )
    _add_repeats(optimizer)
    optimizer.add_argument("--json", action="store_true", help="print JSON instead of a table")
    optimizer.set_defaults(func=_optimizer)


def _add_tiers(verbs: Any) -> None:
    tiers = verbs.add_parser(
        "tiers",
        help="steps with the state of slow levels in host memory or on a drive, beside others",
        description="Time training steps of a recipe with all state on the device and with that "
        "of each level of a period above 1 in host memory (memory: host) or on a drive (nvme), in "
        "turn on random tokens, on this process or, under torchrun, on all of them: step time, "
        "bytes copied against the plan, bytes less on the device. Both lie there at the same time.",
    )
    tiers.add_argument(
        "--memory",
        choices=[tier.value for tier in Tier if tier != Tier.hbm],
        default=Tier.host.value,
        help="where that of slow levels is; nvme takes tiers.folder (default: %(default)s)",
    )
    tiers.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | KEY=VALUE",
        help=f"a YAML file of keys, or the name of one that comes with nlscale (default: "
        f"{' '.join(_STREAMED)}), and overrides of its keys",
    )
    tiers.add_argument(
        "--cycles",
        type=whole(),
        default=5,
        metavar="N",
        help="cycles of the periods to time (default: %(default)s)",
    )
    tiers.add_argument("--json", action="store_true", help="print JSON instead of a table")
    tiers.set_defaults(func=_tiers)


def _add_mixers(parser: argparse.ArgumentParser, mixers: list[str]) -> None:
    parser.add_argument(
        "--mixers",
        nargs="+",
        default=mixers,
        metavar="MIXER",
        help=f"values of model.mixer (default: {' '.join(mixers)})",
    )


def _add_repeats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=whole(), default=10, metavar="N", help="times (default: %(default)s)"
    )


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=whole(),
        default=20,
        metavar="N",
        help="steps to time (default: %(default)s)",
    )


def _scan(args: argparse.Namespace) -> int:
    _at_least_one("--repeats", args.repeats)
    _at_least_one("--chunk", args.chunk)
    alone("bench scan")
    if args.check:
        return _check()
    if args.compiled is not None:
        return _compiled(args)
    from nlscale.bench.scan import bench_scan, parse_sizes, print_scan  # imports torch

    sizes, mixers = parse_sizes(args.sizes), args.mixers or _SCANNED
    _print(bench_scan(sizes, mixers, args.chunk, args.repeats), print_scan, args)
    return 0


def _compiled(args: argparse.Namespace) -> int:
    from nlscale.bench.scan import parse_sizes  # imports torch
    from nlscale.verify.compiled import MIXERS, SIZES, compile_scan, print_compiled

    sizes, mixers = parse_sizes(args.sizes or SIZES), args.mixers or MIXERS
    result = compile_scan(args.compiled, sizes, mixers, args.chunk)
    _print(result, print_compiled, args)
    for row in result["rows"]:
        if not row["resident"]:
            raise UserError(
                f"{row['kernel']} of {row['mixer']} at {row['size']} takes {row['shared_bytes']} "
                f"bytes of shared memory, more than {args.compiled} has; use a smaller chunk or "
                f"head size there, or train.kernels=false"
            )
    return 0


def _check() -> int:
    from nlscale.verify.kernels import check_scan  # imports torch

    result = check_scan()
    print(json.dumps(result, indent=1))
    wrong = [row for row in result["rows"] if not row["ok"]]
    if wrong:
        worst = max(wrong, key=lambda row: row["error"])
        raise UserError(
            f"{len(wrong)} of {len(result['rows'])} checks failed, worst {worst['kernel']}, "
            f"{worst['case']} of size {worst['size']} in {worst['dtype']}: {worst['what']} is off "
            f"by {worst['error']:.1e}; do not train here with this Triton ({result['triton']}), "
            f"use another"
        )
    return 0


def _layer(args: argparse.Namespace) -> int:
    _at_least_one("--repeats", args.repeats)
    configs = _configs(args)
    if patterns := [config.model.pattern for config in configs if config.model.pattern]:
        raise UserError(
            f"bench layer times one block, and a pattern has several kinds: use --mixers "
            f"{' '.join(dict.fromkeys(entry.mixer for entry in patterns[0]))}"
        )
    alone("bench layer")
    from nlscale.bench.layer import bench_layer, print_layer  # imports torch

    _print(bench_layer(configs, args.repeats), print_layer, args)
    return 0


def _optimizer(args: argparse.Namespace) -> int:
    _at_least_one("--repeats", args.repeats)
    alone("bench optimizer")
    from nlscale.config import recipe
    from nlscale.optim.table import REST, RULES
    from nlscale.plan.checks import check_sizes

    given = bool(args.words) and "=" not in args.words[0]
    words = args.words if given else [*_UPDATED, *args.words]
    rules = args.rules or [name for name in RULES if name != REST]
    configs = [
        recipe.load(words[0], [*words[1:], f"optimizer.rule={name}"], trusted=True).config
        for name in (REST, *rules)
    ]
    for config in configs:
        for level in config.levels.spectrum:
            level.optimizer = {k: v for k, v in level.optimizer.items() if k != "rule"}
        check_sizes(config, place().world)
    from nlscale.bench.updates import bench_optimizer, print_optimizer  # imports torch

    _print(bench_optimizer(configs[0], configs[1:], args.repeats), print_optimizer, args)
    return 0


def _tiers(args: argparse.Namespace) -> int:
    _at_least_one("--cycles", args.cycles)
    from nlscale.config import recipe
    from nlscale.plan.checks import check_sizes
    from nlscale.plan.largest import slow_in

    given = bool(args.words) and "=" not in args.words[0]
    words = args.words if given else [*_STREAMED, *args.words]
    config, memory = recipe.load(words[0], words[1:], trusted=True).config, Tier(args.memory)
    for own in (config, slow_in(config, memory)):
        check_sizes(own, place().world)
    from nlscale.bench.tiers import bench_tiers, print_tiers  # imports torch

    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed would warn that drives wear out
        result = bench_tiers(config, args.cycles, memory)
    if place().rank == 0:
        _print(result, print_tiers, args)
    return 0


def _step(args: argparse.Namespace) -> int:
    _at_least_one("--steps", args.steps)
    from nlscale.plan.checks import check_sizes

    config = config_of(args)
    check_sizes(config, place().world)
    from nlscale.bench.step import bench_step  # imports torch

    result = bench_step(config, args.steps)
    if place().rank == 0:
        print(json.dumps(result, indent=1))
    return 0


def _train(args: argparse.Namespace) -> int:
    _at_least_one("--steps", args.steps)
    if args.trace is not None and not args.trace.parent.is_dir():
        raise UserError(f"--trace {args.trace}: there is no folder {args.trace.parent}")
    configs = _configs(args)
    if configs[0].model.vocabulary is None:
        raise UserError("bench train reads no data: give model.vocabulary=256, for example")
    from nlscale.bench.train import bench_train, print_train  # imports torch

    result = bench_train(configs, args.steps, args.trace)
    if place().rank == 0:
        _print(result, print_train, args)
    return 0


def _configs(args: argparse.Namespace) -> list[Config]:
    """The recipe with each mixer, or each pattern of mixers, written [hope, attention]: what a
    mixer's keys mean follows from it on loading."""
    from nlscale.plan.checks import check_sizes

    configs = [
        config_of(args, f"model.pattern={mixer}")
        if mixer.startswith("[")
        else config_of(args, f"model.mixer={mixer}", "model.pattern=[]")
        for mixer in args.mixers
    ]
    for config in configs:
        check_sizes(config, place().world)
    return configs


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{option} {value} is less than 1")


def _print(
    result: dict[str, Any], show: Callable[[dict[str, Any]], None], args: argparse.Namespace
) -> None:
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
