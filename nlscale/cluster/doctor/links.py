"""What the measured bandwidths and latency mean for training."""

from __future__ import annotations

import statistics

from nlscale.cluster.doctor.findings import Finding, Grade, far_below, plural, span
from nlscale.cluster.doctor.network import Link, Network
from nlscale.cluster.machines import Cluster

_LATE = 5e-3  # seconds; a step has at least one such all-reduce
_ENOUGH = 0.5  # of the rate that the cluster file promises
_GPU_NODES_GBIT = 10.0  # less between nodes with GPUs is no network for training
_GPU_NODE_GBIT = 40.0  # less within a node with GPUs is slower than PCIe
_SLOW_HOST = (
    "every reduction waits for the slowest link: see cable, port and link rate (`ethtool`), or "
    "leave the node out"
)


def judge(network: Network, cluster: Cluster | None = None) -> list[Finding]:
    """Latency, bandwidth within and across nodes, and which host is slow.

    Args:
        network: what was measured.
        cluster: what the network is said to be.
    """
    if network.trouble:
        return _not_connected(network)
    findings = []
    if network.latency is not None:
        findings.append(_latency(network, network.latency))
    if network.within:
        findings += _within(network)
    if network.across is not None:
        findings.append(_across(network, cluster))
    if network.links:
        findings += _slow_hosts(network)
    return findings


def _not_connected(network: Network) -> list[Finding]:
    hosts = tuple(network.trouble)
    said = next(iter(network.trouble.values()))
    return [
        Finding(
            "connection",
            Grade.error,
            f"{network.backend} fails: {said}",
            f"let a firewall pass all TCP ports between the nodes, not MASTER_PORT alone; "
            f"{_interface(network)}",
            hosts,
        )
    ]


def _latency(network: Network, latency: float) -> Finding:
    check = "latency"
    measured = f"{_milliseconds(latency)} for a small all-reduce of {network.ranks:,} ranks"
    if network.ranks == 1 or latency <= _LATE:
        return Finding(check, Grade.ok, measured)
    return Finding(
        check,
        Grade.warning,
        measured,
        f"all ranks agree on every step in one, so a step takes at least that; ranks that share "
        f"cores wait for each other, else {_interface(network)}",
    )


def _within(network: Network) -> list[Finding]:
    check = "within a node"
    rates = {host: measured.gbit for host, measured in network.within.items()}
    ranks = next(iter(network.within.values())).ranks
    text = f"{span(rates.values(), _rate)} with {network.backend}, {plural(ranks, 'rank')} a node"
    findings = [Finding(check, Grade.ok, text)]
    slow = {host for host, rate in rates.items() if rate < _GPU_NODE_GBIT}
    slow = slow if network.backend == "nccl" else set()
    for host in dict.fromkeys([*slow, *far_below(rates)]):
        usual = statistics.median(rates.values())
        advice = (
            "`nvidia-smi topo -m` shows how its GPUs are joined; NCCL_P2P_DISABLE must not be set"
            if network.backend == "nccl"
            else f"the other nodes have {_rate(usual)}: see what else runs on its cores"
        )
        findings.append(Finding(check, Grade.warning, _rate(rates[host]), advice, (host,)))
    return findings


def _across(network: Network, cluster: Cluster | None) -> Finding:
    assert network.across is not None
    check, best = "across nodes", network.across.gbit
    measured = (
        f"{_rate(best)} with {network.backend}, one rank on each of {network.across.ranks} nodes"
    )
    if network.everyone is not None:
        best = max(best, network.everyone.gbit)
        measured += f"; {_rate(network.everyone.gbit)} with all {network.ranks:,} ranks"
    least = _GPU_NODES_GBIT if network.backend == "nccl" else 0.0
    if cluster is not None:
        measured += f"; {cluster.name} has {_rate(cluster.inter_node_gbit)}"
        least = _ENOUGH * cluster.inter_node_gbit
    if best >= least:
        return Finding(check, Grade.ok, measured)
    return Finding(check, Grade.warning, measured, _interface(network))


def _slow_hosts(network: Network) -> list[Finding]:
    """Name the ends of links that are far slower than the others."""
    check, links = "slow host", network.links
    usual = statistics.median(link.gbit for link in links)
    slow = [link for link in links if link.gbit < _ENOUGH * usual]
    if not slow:
        text = f"none: each node and the first exchange {span((x.gbit for x in links), _rate)}"
        return [Finding(check, Grade.ok, text)]
    if len(links) == 2:  # two nodes: nothing says which of them it is
        (link,) = slow
        back = next(other for other in links if other is not link)
        way = f"from {link.sender} to {link.receiver}"
        measured = f"{_rate(link.gbit)} {way}, {_rate(back.gbit)} back"
        return [Finding(check, Grade.warning, measured, _SLOW_HOST)]
    findings = []
    first, others = links[0].sender, len(links) // 2
    for does, end in (("sends", "sender"), ("receives", "receiver")):
        of_first = [link for link in slow if getattr(link, end) == first]
        if 2 * len(of_first) > others:
            # slow with most others: it is the first node that is slow, not each of them
            findings.append(_slow(check, first, does, of_first, usual))
            slow = [link for link in slow if link not in of_first]
    for link in slow:
        if link.sender == first:
            findings.append(_slow(check, link.receiver, "receives", [link], usual))
        else:
            findings.append(_slow(check, link.sender, "sends", [link], usual))
    return findings


def _slow(check: str, host: str, does: str, links: list[Link], usual: float) -> Finding:
    rate = statistics.median(link.gbit for link in links)
    return Finding(
        check,
        Grade.warning,
        f"{does} only {_rate(rate)}, {_rate(usual)} is usual here",
        _SLOW_HOST,
        (host,),
    )


def _interface(network: Network) -> str:
    if network.backend == "nccl":
        return (
            "see that the fast network is used: NCCL_DEBUG=INFO says NET/IB or NET/Socket; "
            "NCCL_IB_HCA and NCCL_SOCKET_IFNAME choose"
        )
    return "see that the fast interface is used: GLOO_SOCKET_IFNAME names it"


def _rate(gbit: float) -> str:
    if gbit < 1:
        return f"{gbit * 1e3:.3g} Mbit/s"
    return f"{gbit:.3g} Gbit/s" if gbit < 999.5 else f"{gbit:.0f} Gbit/s"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.0995 else f"{seconds * 1e3:.0f} ms"
