"""`nlscale launch slurm|torchrun`."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from nlscale.cli.arguments import add_cluster, add_recipe, config_of, whole
from nlscale.cluster.machines import Cluster, load_cluster
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `launch` takes; sets `func(args) -> int`."""
    where = parser.add_subparsers(dest="launcher", metavar="LAUNCHER", required=True)
    slurm = where.add_parser(
        "slurm",
        help="submit a job that trains a recipe on all nodes, and goes on when preempted",
        description="Write launch/slurm/train.sbatch, filled in from a cluster file, into the "
        "run's folder, and submit it.",
    )
    slurm.add_argument("--name", help="of the job (default: the last part of run.dir)")
    slurm.set_defaults(func=_slurm)
    torchrun = where.add_parser(
        "torchrun",
        help="start the ranks of this node",
        description="Start the ranks of this node with torchrun. With several nodes, run it on "
        "each.",
    )
    torchrun.add_argument(
        "--node-rank",
        type=whole(),
        metavar="I",
        help="which of several nodes this is, from 0 (default: the nodes find out themselves)",
    )
    torchrun.set_defaults(func=_torchrun)
    for one in (slurm, torchrun):
        add_recipe(one)
        add_cluster(one, "the machines", required=True)
        one.add_argument(
            "--dry-run",
            action="store_true",
            help="print the script instead of starting it; the data need not be here",
        )


def _slurm(args: argparse.Namespace) -> int:
    from nlscale.cluster.launch.batch import job_script
    from nlscale.cluster.launch.script import print_script
    from nlscale.cluster.launch.slurm import submit

    config, cluster = _checked(args)
    folder = Path(config.run.dir).absolute()
    name = folder.name if args.name is None else args.name
    script = job_script(args.recipe, args.overrides, cluster, name, folder)
    if args.dry_run:
        if not folder.is_dir():
            _warn(
                f"Slurm writes the job's log into run.dir, and says nothing where that is missing: "
                f"mkdir -p {shlex.quote(str(folder))} before you submit this script"
            )
        print_script(script)
        return 0
    job = submit(script, folder / "job.sbatch", [])
    print(f"submitted job {job}: {args.recipe} on {cluster.nodes} x {cluster.gpus_per_node} ranks")
    print(f"output: {folder}/slurm-{job}.log    save and requeue: scancel -s USR1 {job}")
    return 0


def _torchrun(args: argparse.Namespace) -> int:
    from nlscale.cluster.launch.script import print_script
    from nlscale.cluster.launch.torchrun import node_script, run

    config, cluster = _checked(args)
    script = node_script(args.recipe, args.overrides, cluster, args.node_rank)
    if args.dry_run:
        print_script(script)
        return 0
    run(script, Path(config.run.dir).absolute() / f"node-{args.node_rank or 0}.sh")
    return 0  # not reached: this process is the script now


def _checked(args: argparse.Namespace) -> tuple[Config, Cluster]:
    """What would only fail on the nodes, after waiting for them, fails here.

    Raises:
        UserError: the recipe does not fit the cluster, or its data are not there; of a dry run,
            which may be far from the data, only the former.
    """
    from nlscale.data.index import read_index
    from nlscale.evaluate.table import check as check_evaluations
    from nlscale.plan import make_plan
    from nlscale.plan.advice import does_not_fit

    config, cluster = config_of(args), load_cluster(args.cluster)
    check_evaluations(config.evaluate)
    planned, known = config, True
    try:
        for folder in config.data.folders():
            read_index(folder)
    except UserError as error:
        if not args.dry_run:
            raise
        known = config.model.vocabulary is not None
        planned = config if known else _with_the_smallest_vocabulary(config)
        beside = "" if known else ", and the memory and divisibility of the vocabulary"
        _warn(f"{error}. Not checked: the data{beside}")
    plan = make_plan(planned, cluster)
    if not plan.fits:
        raise UserError(does_not_fit(plan, planned))
    used = f"{plan.memory.largest.total / 2**30:.2g} of {cluster.gpu_memory_gib:g} GiB"
    beside = "" if known else ", and what the vocabulary takes"
    print(f"plan: {cluster.ranks} ranks, {used} on the fullest{beside}", file=sys.stderr)
    return config, cluster


def _with_the_smallest_vocabulary(config: Config) -> Config:
    """The configuration with the fewest token ids that its ranks can share: what needs more than
    the machines have even so will not fit."""
    return replace(config, model=replace(config.model, vocabulary=config.parallel.tensor))


def _warn(text: str) -> None:
    print(f"nlscale: warning: {text}", file=sys.stderr)
