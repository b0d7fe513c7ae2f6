"""The scripts in launch/, with the lines between their marks written from a cluster file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from nlscale.cluster.machines import Cluster
from nlscale.config.shipped import SHIPPED

_BEGIN, _END = "# >>> of the cluster\n", "# <<< of the cluster\n"


def script_path(name: str) -> Path:
    """Where a script of launch/ is, such as `slurm/train.sbatch`."""
    return SHIPPED / "launch" / name


def read_script(name: str) -> str:
    """A script of launch/."""
    return script_path(name).read_text(encoding="utf-8")


def fill_in(script: str, lines: list[str]) -> str:
    """The script with these lines between its marks."""
    before, rest = script.split(_BEGIN)
    _, after = rest.split(_END)
    return before + _BEGIN + "".join(f"{line}\n" for line in lines) + _END + after


def environment_of(cluster: Cluster) -> dict[str, str]:
    """Variables of every rank on that cluster."""
    launch = cluster.launch
    found: dict[str, str] = {}
    if launch.interface is not None:
        found = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), launch.interface)
    return found | launch.environment


def exports(variables: dict[str, str]) -> list[str]:
    """Shell lines that set these variables."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def setup_of(cluster: Cluster) -> str:
    """The shell line before the ranks: `launch.setup`, or what finds the Python that runs here."""
    if cluster.launch.setup is not None:
        return cluster.launch.setup
    return f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
