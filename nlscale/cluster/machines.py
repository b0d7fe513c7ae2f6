"""The machines a run is planned for: a small YAML file, see recipes/clusters/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from nlscale.cluster.spread import nodes_of_a_data_group
from nlscale.config import schema
from nlscale.config.fields import within
from nlscale.config.vocabulary import MOST
from nlscale.errors import UserError

_QUOTED = ("partition", "account", "container", "mounts")
_UNEXPANDED = re.compile(r"\$(?:[A-Za-z_]\w*|\{[^}]*\})|(?:^|(?<=[:,=]))~(?=/|$)")
"""A variable of the shell, or a home."""
_TIME = re.compile(r"(?i)([0-9]{1,9}-)?[0-9]{1,9}(:[0-9]{1,9}){0,2}|unlimited|infinite")


UTILISATION = 0.4
"""Share of the GPUs' peak at which a step is taken to compute, where nothing else is said."""


@dataclass
class Slurm:
    """How jobs are submitted."""

    partition: str | None = None
    """Null: the default one."""
    account: str | None = None
    """Null: the user's default."""
    time: str = "24:00:00"
    """Time limit of a job, as Slurm writes it: minutes, hours:minutes:seconds, days-hours and such,
    or UNLIMITED. A run that needs longer goes on by itself in the next one."""
    warn_seconds: int = within(300, above=0, most=65535)
    """How long before the time limit the ranks are told to stop; at least what a checkpoint and two
    steps take."""
    gpus: bool = True
    """Ask for gpus_per_node GPUs on each node; false: ranks run on the CPU."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive or --qos=long, with quotes as in a shell; not
    those that other keys say."""
    container: str | None = None
    """Image for srun's --container-image (pyxis, enroot); null: none."""
    mounts: str | None = None
    """Its --container-mounts."""


@dataclass
class Launch:
    """How ranks are started on the nodes."""

    hosts: list[str] = field(default_factory=list)
    """Names or addresses of the nodes, the first rank's first, where no scheduler chooses them."""
    port: int = within(29500, least=1, most=65535)
    """Of the rendezvous on the first node; Slurm jobs use one that follows from their number."""
    interface: str | None = None
    """Network interface for NCCL's and gloo's sockets, such as ib0; null: they choose."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables of every rank, such as NCCL_DEBUG: WARN."""
    setup: str | None = None
    """Shell line run before Python, in the folder of the launch: under Slurm by each rank, on its
    node and in its container; with torchrun once on each node. Null: the Python that launches, or
    that of the container."""
    slurm: Slurm = field(default_factory=Slurm)
    """Of `nlscale launch slurm`."""


@dataclass
class Cluster:
    """Equal nodes joined by a network."""

    name: str = MISSING
    """Used in tables and figures."""
    nodes: int = within(above=0, most=MOST)
    """Machines."""
    gpus_per_node: int = within(above=0, most=MOST)
    """GPUs of a node; one rank runs on each."""
    inter_node_gbit: float = within(above=0)
    """What one node can send to the others, Gbit/s (10^9 bits a second), all its links together."""
    gpu_memory_gib: float = within(above=0)
    """Memory of one GPU, GiB (2^30 bytes)."""
    gpu_tflops: float | None = within(None, above=0)
    """Dense bf16 peak of one GPU, TFLOP/s (10^12 FLOPs a second), for what a step computes and what
    runs cost."""
    launch: Launch = field(default_factory=Launch)
    """How runs are started there; what only plans does not need it."""
    pcie_gbyte: float = within(55.0, above=0)
    """What a GPU can copy from its node's memory, and at the same time as much to it, GB/s (10^9
    bytes a second); the default is of 16 lanes of PCIe 5."""
    host_memory_gib: float | None = within(None, above=0)
    """Memory of one node, GiB; null: not known, and what `memory: host` takes of it not checked."""

    nvme_gbyte: float = within(6.0, above=0)
    """What the drives of one node can read, and at the same time write, all together, GB/s (10^9
    bytes a second), for levels of `memory: nvme`."""
    nvme_endurance_tb: float | None = within(None, above=0)
    """What may be written to the drives of one node in their life (TBW), TB (10^12 bytes); null:
    not known."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def nodes_of_a_data_group(self, tensor: int, pipeline: int) -> int:
        """Nodes that a data-parallel group spans.

        Raises:
            UserError: see `nlscale.cluster.spread.nodes_of_a_data_group`.
        """
        return nodes_of_a_data_group(self.ranks, self.gpus_per_node, tensor, pipeline)

    def holds(self, size: float) -> bool:
        """Whether a node has memory for that many bytes, as far as is known; a tenth is for the
        rest."""
        return self.host_memory_gib is None or size <= 0.9 * self.host_memory_gib * 2**30

    def link_seconds(self, bytes_leaving: float) -> float:
        """Seconds a node needs to send that many bytes at the full rate of its links."""
        return bytes_leaving * 8 / (self.inter_node_gbit * 1e9)


def _refuse_unexpanded(cluster: Cluster, sources: Mapping[str, str]) -> None:
    """What nothing expands: these values are quoted in scripts, so that they mean themselves."""
    slurm, launch = cluster.launch.slurm, cluster.launch
    texts = {
        **{f"launch.slurm.{name}": getattr(slurm, name) for name in _QUOTED},
        **{f"launch.slurm.options.{i}": option for i, option in enumerate(slurm.options)},
        "launch.interface": launch.interface,
        **{f"launch.hosts.{i}": host for i, host in enumerate(launch.hosts)},
        **{f"launch.environment.{name}": value for name, value in launch.environment.items()},
    }
    for key, value in texts.items():
        found = _UNEXPANDED.search(value or "")
        if found:
            raise UserError(
                f"{key} {value!r} holds {found[0]}, which nothing expands there; write it out, or "
                f"set it in launch.setup, which a shell reads{schema.where(key, sources)}"
            )


_CLUSTER = schema.Kind(
    name="cluster file",
    schema=Cluster,
    form="a cluster is a mapping such as 'nodes: 2'; see recipes/clusters",
    folder="recipes/clusters",
    unset="{} not set; see recipes/clusters",
)


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        UserError: no such file, not YAML, an unknown key (naming the nearest), a missing key, a
            wrong type or a number out of its range.
    """
    tree, sources = schema.read(path, _CLUSTER)
    cluster = schema.build(tree, _CLUSTER, sources)
    _refuse_unexpanded(cluster, sources)
    time = cluster.launch.slurm.time
    if not _TIME.fullmatch(time):
        raise UserError(
            f"launch.slurm.time {time!r} is not a time limit; write [days-]hours:minutes:seconds "
            f"or UNLIMITED, such as '24:00:00'{schema.where('launch.slurm.time', sources)}"
        )
    return cluster
