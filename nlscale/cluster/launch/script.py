"""The scripts in launch/, with the lines between their marks written from a cluster file."""

from __future__ import annotations

import shlex
from pathlib import Path

import nlscale
from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError

CLONE = Path(nlscale.__file__).resolve().parents[1]
"""The folder of the clone, where launch/ is."""
_BEGIN, _END = "# >>> of the cluster\n", "# <<< of the cluster\n"


def read_script(name: str) -> str:
    """A script of launch/, such as `slurm/train.sbatch`.

    Raises:
        UserError: nlscale was installed without the folder launch/.
    """
    path = CLONE / "launch" / name
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"no script at {path} ({error.strerror}); launching needs a clone of the repository, "
            f"installed in place: pip install --editable ."
        ) from None


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
