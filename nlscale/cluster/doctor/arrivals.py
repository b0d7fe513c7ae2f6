"""Who has come: all ranks, in their places, and if not, which ranks and hosts are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from nlscale.cluster.doctor.findings import Finding, Grade, plural
from nlscale.cluster.doctor.meeting import slurm_hosts
from nlscale.cluster.life.place import Place
from nlscale.cluster.machines import Cluster

_CHECK = "ranks"


@dataclass(frozen=True)
class Arrival:
    """A rank that has checked in."""

    hostname: str
    local_rank: int
    local_world: int


def names(first: Place, arrived: dict[int, Arrival]) -> dict[int, str]:
    """The name of its node by rank: the hostname, with the node's number where that is not enough.

    Args:
        first: the place of the first rank.
        arrived: by rank.
    """
    hosts: dict[int, str] = {}
    for rank, arrival in arrived.items():
        hosts.setdefault(rank // first.local_world, arrival.hostname)
    often = Counter(hosts.values())
    return {
        rank: f"{hosts[node]} (node {node})" if often[hosts[node]] > 1 else hosts[node]
        for rank in arrived
        for node in [rank // first.local_world]
    }


def judge(
    first: Place,
    arrived: dict[int, Arrival],
    named: dict[int, str],
    timeout: float,
    cluster: Cluster | None = None,
) -> list[Finding]:
    """Whether all ranks came, and were placed as training takes them to be: node after node.

    Args:
        first: the place of the first rank.
        arrived: by rank.
        named: the nodes' names, by rank.
        timeout: seconds in which they could.
        cluster: what the nodes are said to be.
    """
    if len(arrived) < first.world:
        return [_missing(first, arrived, named, timeout)]
    misplaced = _misplaced(first, arrived)
    if misplaced is not None:
        return [misplaced]
    nodes = first.world // first.local_world
    measured = f"{plural(first.world, 'rank')} on {plural(nodes, 'node')}"
    findings = [Finding(_CHECK, Grade.ok, measured)]
    if cluster is not None and nodes != cluster.nodes:
        measured = f"{cluster.name} has {plural(cluster.nodes, 'node')}, here are {nodes}"
        advice = "correct nodes, or start the command on all of them"
        findings.append(Finding("cluster file", Grade.warning, measured, advice))
    return findings


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` of 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def _missing(
    first: Place, arrived: dict[int, Arrival], named: dict[int, str], timeout: float
) -> Finding:
    missing = [rank for rank in range(first.world) if rank not in arrived]
    at: dict[str, list[int]] = {}
    for rank in missing:
        at.setdefault(_where(first, rank, named), []).append(rank)
    who = "; ".join(f"{_ranks(ranks)} of {where}" for where, ranks in at.items())
    here: dict[str, list[int]] = {}
    for rank, name in named.items():
        here.setdefault(name, []).append(rank)
    present = "; ".join(f"{_ranks(ranks)} on {name}" for name, ranks in here.items())
    return Finding(
        _CHECK,
        Grade.error,
        f"{len(arrived)} of {plural(first.world, 'rank')} came within {timeout:g} s. "
        f"Missing: {who}. Here: {present}",
        f"see that the command runs there and what it says, and that {first.meeting_point} "
        f"can be reached from there; slow to start: a longer --timeout",
    )


def _where(first: Place, rank: int, named: dict[int, str]) -> str:
    """The node of a rank that has not come, by its name where others of it have."""
    node = rank // first.local_world
    for other, name in named.items():
        if other // first.local_world == node:
            return name
    nodes, hosts = -(-first.world // first.local_world), slurm_hosts()
    return f"node {node}" + (f" ({hosts[node]}, says Slurm)" if len(hosts) == nodes else "")


def _misplaced(first: Place, arrived: dict[int, Arrival]) -> Finding | None:
    """Ranks that are not numbered node after node, or nodes of unequal size."""
    sizes = Counter(arrival.local_world for arrival in arrived.values())
    if len(sizes) > 1 or first.world % first.local_world:
        said = ", ".join(f"{count} ranks say {size}" for size, count in sizes.items())
        measured = f"{first.world} ranks do not fill equal nodes; LOCAL_WORLD_SIZE: {said}"
        return Finding(_CHECK, Grade.error, measured, "start as many ranks on every node")
    for rank, arrival in arrived.items():
        node, local = divmod(rank, first.local_world)
        host = arrived[node * first.local_world].hostname
        if (arrival.hostname, arrival.local_rank) != (host, local):
            return Finding(
                _CHECK,
                Grade.error,
                f"rank {rank} is LOCAL_RANK {arrival.local_rank} on {arrival.hostname}; training "
                f"takes it to be {local} of node {node}, {host}",
                "number ranks node after node: srun --distribution=block, or torchrun",
            )
    return None


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {ranges(ranks)}"
