"""The machines a run is planned for: a small YAML file, see recipes/clusters/."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nlscale.errors import UserError

_FOLDER = Path("recipes/clusters")
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text"}


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
    known = [f.name for f in fields(Cluster)]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"{path}: unknown key {str(key)!r}; {hint}")
    missing = [name for name in known if tree.get(name) is None]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} not set; see {_FOLDER}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Cluster), OmegaConf.create(tree))
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", ""))
        wanted = _KINDS.get(get_type_hints(Cluster).get(key, str))
        raise UserError(f"{path}: {key}: {tree.get(key)!r} is not {wanted}") from None
    assert isinstance(cluster, Cluster)
    for name in ("nodes", "gpus_per_node", "inter_node_gbit", "gpu_memory_gib"):
        value = getattr(cluster, name)
        if not 0 < value < math.inf:
            raise UserError(f"{path}: {name} is {value}; it must be greater than 0")
    return cluster


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
