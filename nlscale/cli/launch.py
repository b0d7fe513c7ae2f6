"""`nlscale launch slurm|torchrun`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nlscale.cli.arguments import add_cluster, add_recipe, config_of
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
        type=int,
        metavar="I",
        help="which of several nodes this is, from 0 (default: the nodes find out themselves)",
    )
    torchrun.set_defaults(func=_torchrun)
    for one in (slurm, torchrun):
        add_recipe(one)
        add_cluster(one, "the machines", required=True)
        one.add_argument(
            "--dry-run", action="store_true", help="print the script instead of starting it"
        )


def _slurm(args: argparse.Namespace) -> int:
    from nlscale.cluster.launch.slurm import job_script, submit

    config, cluster = _checked(args)
    folder = Path(config.run.dir).absolute()
    name = args.name or folder.name
    script = job_script(args.recipe, args.overrides, cluster, name, folder)
    if args.dry_run:
        print(script, end="")
        return 0
    job = submit(script, folder / "job.sbatch", [])
    print(f"submitted job {job}: {args.recipe} on {cluster.nodes} x {cluster.gpus_per_node} ranks")
    print(f"output: {folder}/slurm-{job}.log    save and requeue: scancel -s USR1 {job}")
    return 0


def _torchrun(args: argparse.Namespace) -> int:
    from nlscale.cluster.launch.torchrun import node_script, run

    config, cluster = _checked(args)
    script = node_script(args.recipe, args.overrides, cluster, args.node_rank)
    if args.dry_run:
        print(script, end="")
        return 0
    run(script, Path(config.run.dir).absolute() / f"node-{args.node_rank or 0}.sh")
    return 0  # not reached: this process is the script now


def _checked(args: argparse.Namespace) -> tuple[Config, Cluster]:
    """What would only fail on the nodes, after waiting for them, fails here.

    Raises:
        UserError: the recipe does not fit the cluster, or its data are not there.
    """
    from nlscale.data.index import read_index
    from nlscale.evaluate.table import check as check_evaluations
    from nlscale.plan import make_plan
    from nlscale.plan.advice import does_not_fit

    config, cluster = config_of(args), load_cluster(args.cluster)
    check_evaluations(config.evaluate)
    if not args.dry_run:
        read_index(config.data.dir)
    plan = make_plan(config, cluster)
    if not plan.fits:
        raise UserError(does_not_fit(plan, config))
    used = f"{plan.memory.largest.total / 2**30:.2g} of {cluster.gpu_memory_gib:g} GiB"
    print(f"plan: {cluster.ranks} ranks, {used} on the fullest", file=sys.stderr)
    return config, cluster
