"""`nlscale launch torchrun`: the ranks of one node, where no scheduler starts them."""

from __future__ import annotations

import os
from pathlib import Path

from nlscale.cluster.launch.check import check_hosts, check_launch
from nlscale.cluster.launch.quote import shell, shell_words
from nlscale.cluster.launch.script import (
    environment_of,
    exports,
    script_path,
    setup_of,
    write_script,
)
from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError

_SETUP = """\
failed() {
    trap - EXIT
    echo "launch.setup failed on $(hostname) with exit code $1" >&2
    exit 2
}
trap 'failed "$?"' EXIT
set +euo pipefail
eval "$setup" || failed "$?"
set -euo pipefail
trap - EXIT"""
"""Runs `launch.setup` as a shell of its own would, and ends with one line where it fails."""


def node_script(recipe: str, overrides: list[str], cluster: Cluster, node: int | None) -> str:
    """The shell script that starts the ranks of a node, in the folder where it is written.

    Args:
        recipe: its path or name.
        overrides: of its keys.
        cluster: the machines; with several, `launch.hosts` names them.
        node: which of them, from 0; None: the nodes find their ranks themselves.

    Raises:
        UserError: several nodes without hosts, a node that is none of them, or a value that cannot
            stand in a script.
    """
    launch = cluster.launch
    check_launch(cluster)
    check_hosts(launch)
    variables = {"RANKS": str(cluster.gpus_per_node)}
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
    lines = [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        f"cd {shell(str(Path.cwd()))}",
        *exports(environment_of(cluster)),
        "# shellcheck disable=SC2016  # evaluated below",
        f"setup={shell(setup_of(cluster))}",
        _SETUP,
        *exports(variables),
        f"exec {shell_words(['bash', str(script_path(name)), recipe, *overrides])}",
    ]
    return "\n".join(lines) + "\n"


def run(script: str, path: Path) -> None:
    """Become that script; does not return.

    Raises:
        UserError: it cannot be written, or there is no bash.
    """
    write_script(script, path)
    try:
        os.execvp("bash", ["bash", str(path)])
    except OSError as error:
        raise UserError(f"cannot run bash: {error.strerror}") from None
