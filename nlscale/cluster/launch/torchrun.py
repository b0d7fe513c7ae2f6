"""`nlscale launch torchrun`: the ranks of one node, where no scheduler starts them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from nlscale.cluster.launch.script import environment_of, exports, script_path, setup_of
from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError


def node_script(recipe: str, overrides: list[str], cluster: Cluster, node: int | None) -> str:
    """The shell script that starts the ranks of a node, in the folder where it is written.

    Args:
        recipe: its path or name.
        overrides: of its keys.
        cluster: the machines; with several, `launch.hosts` names them.
        node: which of them, from 0; None: the nodes find their ranks themselves.

    Raises:
        UserError: several nodes without hosts, or a node that is none of them.
    """
    launch = cluster.launch
    variables = environment_of(cluster) | {"RANKS": str(cluster.gpus_per_node)}
    name = "torchrun/one-node.sh"
    if cluster.nodes > 1:
        name = "torchrun/many-nodes.sh"
        if len(launch.hosts) != cluster.nodes:
            raise UserError(
                f"{cluster.name}: launch.hosts names {len(launch.hosts)} of {cluster.nodes} nodes; "
                f"without a scheduler it must name all, the first rank's first"
            )
        variables |= {"HEAD": f"{launch.hosts[0]}:{launch.port}", "NODES": str(cluster.nodes)}
        if node is not None:
            variables["NODE_RANK"] = str(node)
    if node is not None and not 0 <= node < cluster.nodes:
        raise UserError(f"--node-rank {node}: {cluster.name} has nodes 0 to {cluster.nodes - 1}")
    command = shlex.join(["bash", str(script_path(name)), recipe, *overrides])
    lines = [
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        setup_of(cluster),
        *exports(variables),
        f"exec {command}",
    ]
    return "\n".join(["#!/usr/bin/env bash", *lines]) + "\n"


def run(script: str, path: Path) -> None:
    """Become that script; does not return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    os.execvp("bash", ["bash", str(path)])
