"""The scripts in launch/, with the lines between their marks written from a cluster file."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from nlscale.cluster.launch.quote import shell
from nlscale.cluster.machines import Cluster
from nlscale.config.shipped import SHIPPED
from nlscale.errors import UserError

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


def write_script(script: str, path: Path) -> None:
    """Write a script, and the folder around it.

    Raises:
        UserError: that cannot be done.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def print_script(script: str) -> None:
    """Print a script in UTF-8, as its file has it, whatever the encoding of the terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(script, end="")


def environment_of(cluster: Cluster) -> dict[str, str]:
    """Variables of every rank on that cluster."""
    launch = cluster.launch
    found: dict[str, str] = {}
    if launch.interface is not None:
        found = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), launch.interface)
    return found | launch.environment


def exports(variables: dict[str, str]) -> list[str]:
    """Shell lines that set these variables."""
    return [f"export {name}={shell(value)}" for name, value in variables.items()]


def setup_of(cluster: Cluster, contained: bool = False) -> str:
    """The shell line before a rank: `launch.setup`, or what finds the Python that runs here.

    Args:
        cluster: the machines.
        contained: whether the rank runs in a container, which brings a Python of its own.

    Raises:
        UserError: this Python is in a folder that no PATH can name.
    """
    if cluster.launch.setup is not None:
        return cluster.launch.setup
    if contained:
        return ":"
    folder = str(Path(sys.executable).parent)
    if os.pathsep in folder:
        raise UserError(
            f"this Python is in {folder!r}, and PATH cannot name a folder with a colon; set "
            f"launch.setup in the cluster file"
        )
    return f'export PATH={shell(folder)}:"$PATH"'
