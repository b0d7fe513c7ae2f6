"""The machines a run is planned for: a small YAML file, see recipes/clusters/."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nlscale.errors import UserError

_FOLDER = Path("recipes/clusters")
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    float | None: "a number",
    str: "a text",
    bool: "true or false",
}
_TIME = re.compile(r"(\d+-)?\d+:\d\d:\d\d")


@dataclass
class Slurm:
    """How jobs are submitted."""

    partition: str | None = None
    """Null: the default one."""
    account: str | None = None
    """Null: the user's default."""
    time: str = "24:00:00"
    """Time limit of a job, as Slurm writes it: [days-]hours:minutes:seconds. A run that needs
    longer goes on by itself in the next one."""
    warn_seconds: int = 300
    """How long before the time limit the ranks are told to stop; at least what a checkpoint and two
    steps take."""
    gpus: bool = True
    """Ask for gpus_per_node GPUs on each node; false: ranks run on the CPU."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive or --qos=long."""
    container: str | None = None
    """Image for srun's --container-image (pyxis, enroot); null: none."""
    mounts: str | None = None
    """Its --container-mounts."""


@dataclass
class Launch:
    """How ranks are started on the nodes."""

    hosts: list[str] = field(default_factory=list)
    """Names or addresses of the nodes, the first rank's first, where no scheduler chooses them."""
    port: int = 29500
    """Of the rendezvous on the first node; Slurm jobs use one that follows from their number."""
    interface: str | None = None
    """Network interface for NCCL's and gloo's sockets, such as ib0; null: they choose."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables of every rank, such as NCCL_DEBUG: WARN."""
    setup: str = "source .venv/bin/activate"
    """Shell line run on each node before its ranks, in the folder of the clone."""
    slurm: Slurm = field(default_factory=Slurm)
    """Of `nlscale launch slurm`."""


@dataclass
class Cluster:
    """Equal nodes joined by a network."""

    name: str = MISSING
    """Used in tables and figures."""
    nodes: int = MISSING
    """Machines."""
    gpus_per_node: int = MISSING
    """GPUs of a node; one rank runs on each."""
    inter_node_gbit: float = MISSING
    """What one node can send to the others, Gbit/s (10^9 bits a second), all its links together."""
    gpu_memory_gib: float = MISSING
    """Memory of one GPU, GiB (2^30 bytes)."""
    gpu_tflops: float | None = None
    """Dense bf16 peak of one GPU, TFLOP/s (10^12 FLOPs a second); only what prices needs it."""
    launch: Launch = field(default_factory=Launch)
    """How runs are started there; what only plans does not need it."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def nodes_of_a_data_group(self, tensor: int, pipeline: int) -> int:
        """Nodes that a data-parallel group spans; megatron-core numbers tensor, data, pipeline.

        Raises:
            UserError: the groups do not spread evenly over the nodes.
        """
        of_a_pipeline_rank = self.ranks // pipeline
        if of_a_pipeline_rank % self.gpus_per_node and self.gpus_per_node % of_a_pipeline_rank:
            raise UserError(
                f"parallel.pipeline {pipeline} gives each pipeline rank {of_a_pipeline_rank} GPUs "
                f"({of_a_pipeline_rank // tensor} data-parallel x {tensor} tensor-parallel), which "
                f"do not spread evenly over nodes of {self.gpus_per_node}; use a pipeline for "
                f"which they fill whole nodes, or several fill one"
            )
        return max(1, of_a_pipeline_rank // self.gpus_per_node)

    def link_seconds(self, bytes_leaving: float) -> float:
        """Seconds a node needs to send that many bytes at the full rate of its links."""
        return bytes_leaving * 8 / (self.inter_node_gbit * 1e9)


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        UserError: no such file, not YAML, an unknown key (naming the nearest), a missing key, a
            wrong type or a number that is not greater than 0.
    """
    path = Path(path)
    tree = _read(path)
    _check_keys(path, tree, Cluster, "")
    missing = [f.name for f in fields(Cluster) if f.default == MISSING and tree.get(f.name) is None]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} not set; see {_FOLDER}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Cluster), OmegaConf.create(tree))
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", ""))
        hints: dict[str, Any] = get_type_hints(Cluster)
        value: Any = tree
        for name in key.split("."):
            hints, kind = _hints_of(hints.get(name)), hints.get(name, float)
            value = value.get(name) if isinstance(value, dict) else value
        raise UserError(f"{path}: {key}: {value!r} is not {_KINDS.get(kind, 'right')}") from None
    assert isinstance(cluster, Cluster)
    for name in ("nodes", "gpus_per_node", "inter_node_gbit", "gpu_memory_gib", "gpu_tflops"):
        value = getattr(cluster, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{path}: {name} is {value}; it must be greater than 0")
    if not _TIME.fullmatch(cluster.launch.slurm.time):
        raise UserError(
            f"{path}: launch.slurm.time {cluster.launch.slurm.time!r} is not a time limit; write "
            f"[days-]hours:minutes:seconds in quotes, such as '24:00:00'"
        )
    return cluster


def _check_keys(path: Path, tree: dict[Any, Any], kind: type, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(hints)}"
            raise UserError(f"{path}: unknown key {f'{prefix}{key}'!r}; {hint}")
        if is_dataclass(hints[key]) and isinstance(value, dict):
            _check_keys(path, value, hints[key], f"{prefix}{key}.")


def _hints_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind) if is_dataclass(kind) else {}


def _read(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        here = sorted(str(p) for p in _FOLDER.glob("*.yaml"))
        hint = f"; there are {', '.join(here)}" if here else ""
        raise UserError(f"no cluster file at {path}{hint}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a cluster is a mapping such as 'nodes: 2'; see {_FOLDER}")
    return tree
