"""What is judged between hosts: who came, clocks, folders, bandwidth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from doctors import CLUSTER, grades, one

from nlscale.cluster.doctor import arrivals, clocks, data_folder, links, shared_files
from nlscale.cluster.doctor.arrivals import Arrival
from nlscale.cluster.doctor.clocks import Offset
from nlscale.cluster.doctor.data_folder import Data
from nlscale.cluster.doctor.findings import Finding, Grade, span
from nlscale.cluster.doctor.meeting import expand_hosts
from nlscale.cluster.doctor.network import AllReduce, Link, Network
from nlscale.cluster.life.place import Place

FIRST = Place(rank=0, world=6, local_rank=0, local_world=2, address="node-a", port=29500)
SIZE = 1 << 25


def come(*ranks: int) -> dict[int, Arrival]:
    """Those of six ranks on three nodes."""
    return {rank: Arrival(f"node-{'abc'[rank // 2]}", rank % 2, 2) for rank in ranks}


def judge_arrivals(arrived: dict[int, Arrival]) -> list[Finding]:
    return arrivals.judge(FIRST, arrived, arrivals.names(FIRST, arrived), 60, CLUSTER)


def test_missing_ranks_are_listed_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    missing = one(judge_arrivals(come(0, 1, 2)), Grade.error)
    assert "3 of 6 ranks came within 60 s" in missing.measured
    assert "Missing: rank 3 of node-b; ranks 4-5 of node 2." in missing.measured
    assert "Here: ranks 0-1 on node-a; rank 2 on node-b" in missing.measured
    assert "--timeout" in missing.advice and "node-a:29500" in missing.advice
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node-a,node-b,gpu[017]")
    missing = one(judge_arrivals(come(0, 1, 2)), Grade.error)
    assert "ranks 4-5 of node 2 (gpu017, says Slurm)" in missing.measured


def test_ranks_must_be_placed_node_after_node() -> None:
    whole = come(*range(6))
    assert judge_arrivals(whole)[0].grade == Grade.ok
    cyclic = {rank: Arrival(f"node-{'abc'[rank % 3]}", rank // 3, 2) for rank in range(6)}
    wrong = one(judge_arrivals(cyclic), Grade.error)
    assert "rank 1 is LOCAL_RANK 0 on node-b" in wrong.measured
    assert "--distribution=block" in wrong.advice
    uneven = whole | {5: replace(whole[5], local_world=1)}
    assert "do not fill equal nodes" in one(judge_arrivals(uneven), Grade.error).measured


def test_another_number_of_nodes_than_the_cluster_file_has() -> None:
    found = one(judge_arrivals(come(*range(6))), Grade.warning)
    assert found.measured == "pair has 2 nodes, here are 3"


def test_nodes_of_one_hostname_are_told_apart() -> None:
    arrived = {rank: Arrival("vm", rank % 2, 2) for rank in range(6)}
    assert set(arrivals.names(FIRST, arrived).values()) == {f"vm (node {i})" for i in range(3)}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("login", ["login"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[1-2]x,a", ["r1n1x", "r1n2x", "r2n1x", "r2n2x", "a"]),
    ],
)
def test_slurm_lists_of_hosts_are_read(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_a_clock_that_is_off_is_named() -> None:
    offsets = {"node-b": Offset(0.2, 1e-3), "node-c": Offset(-40.0, 1e-3)}
    off = one(clocks.judge(offsets, "node-a"), Grade.warning)
    assert off.hosts == ("node-c",) and off.measured == "40.0 s behind node-a"
    assert "chrony" in off.advice
    fine = clocks.judge({"node-b": Offset(0.2, 1e-3)}, "node-a")
    assert grades(fine) == [("clocks", Grade.ok, ())] and "200.0 ms" in fine[0].measured


def test_a_node_with_a_folder_of_its_own_is_named() -> None:
    unseen = {"node-b": None, "node-c": "is not there"}
    bad = one(shared_files.judge("runs", "node-a", unseen, {"node-b": None}), Grade.error)
    assert bad.hosts == ("node-c",) and "all nodes share" in bad.advice
    back = {"node-b": "is not there", "node-c": None}
    bad = one(shared_files.judge("runs", "node-a", dict.fromkeys(back), back), Grade.error)
    assert bad.hosts == ("node-b",) and "not seen by node-a" in bad.measured


def test_a_node_with_other_data_is_named() -> None:
    whole = Data("data", None, "aaa", 10**9, 16, 2 * 10**9)
    found = {
        "node-a": whole,
        "node-b": replace(whole, fingerprint="bbb"),
        "node-c": Data("data", "no data at data; build it with: nlscale data build"),
        "node-d": whole,
    }
    fine, other, missing = data_folder.judge(found)
    assert (fine.grade, fine.hosts) == (Grade.ok, ("node-a", "node-d"))
    assert (other.grade, other.hosts) == (Grade.error, ("node-b",))
    assert (missing.grade, missing.hosts) == (Grade.error, ("node-c",))
    assert "nlscale data build" in missing.advice


def at(gbit: float, ranks: int) -> AllReduce:
    """All-reduces with that bus bandwidth."""
    return AllReduce(ranks, {SIZE: SIZE * 8 * 2 * (ranks - 1) / ranks / (gbit * 1e9)})


def network(across: float, links_: tuple[Link, ...] = (), backend: str = "nccl") -> Network:
    within = {"node-a": at(2000, 8), "node-b": at(2000, 8)}
    return Network(backend, 16, {}, 1e-4, within, at(across / 4, 2), at(across, 16), links_)


def test_bus_bandwidth_is_what_a_ring_passes_on() -> None:
    # two nodes that exchange 25 MB each way in one second
    assert AllReduce(2, {25_000_000: 1.0}).gbit == pytest.approx(0.2)
    # a ring of four passes 1.5 times the size on from each
    assert AllReduce(4, {25_000_000: 1.0}).gbit == pytest.approx(0.3)
    assert AllReduce(2, {1000: 1.0, 25_000_000: 1.0}).gbit == pytest.approx(0.2)


def test_bandwidth_is_compared_with_the_cluster_file() -> None:
    fine = links.judge(network(210), CLUSTER)
    assert {finding.grade for finding in fine} == {Grade.ok}
    assert any("210 Gbit/s with all 16 ranks; pair has 400 Gbit/s" in f.measured for f in fine)
    slow = one(links.judge(network(190), CLUSTER), Grade.warning)
    assert slow.check == "across nodes" and "NCCL_SOCKET_IFNAME" in slow.advice
    slow = one(links.judge(network(1), None), Grade.warning)
    assert slow.check == "across nodes", "no network for GPUs, whatever the cluster"
    slow = one(links.judge(network(10, backend="gloo"), CLUSTER), Grade.warning)
    assert "GLOO_SOCKET_IFNAME" in slow.advice


def test_a_node_that_is_slow_inside_is_named() -> None:
    slow = replace(network(400), within={"node-a": at(2000, 8), "node-b": at(20, 8)})
    found = one(links.judge(slow), Grade.warning)
    assert found.hosts == ("node-b",) and "nvidia-smi topo" in found.advice


def star(sends: list[float], receives: list[float]) -> tuple[Link, ...]:
    """What each other node sends to node-0, and receives from it."""
    found = [Link("node-0", f"node-{i}", gbit) for i, gbit in enumerate(receives, 1)]
    return (*found, *(Link(f"node-{i}", "node-0", gbit) for i, gbit in enumerate(sends, 1)))


@pytest.mark.parametrize(
    ("sends", "receives", "named"),
    [
        ([90, 10, 90], [90, 90, 90], {("node-2", "sends")}),
        ([90, 90, 90], [90, 90, 10], {("node-3", "receives")}),
        ([90, 10, 90], [90, 10, 90], {("node-2", "sends"), ("node-2", "receives")}),
        ([90, 90, 90], [10, 10, 11], {("node-0", "sends")}),
        ([10, 11, 10], [90, 90, 90], {("node-0", "receives")}),
    ],
)
def test_the_slow_host_is_named(
    sends: list[float], receives: list[float], named: set[tuple[str, str]]
) -> None:
    found = links.judge(network(400, star(sends, receives)))
    slow = [finding for finding in found if finding.check == "slow host"]
    assert {finding.grade for finding in slow} == {Grade.warning}
    assert {(f.hosts[0], f.measured.split()[0]) for f in slow} == named


def test_of_two_nodes_the_slow_direction_is_named() -> None:
    found = one(links.judge(network(400, star([10], [90]))), Grade.warning)
    assert "10 Gbit/s from node-1 to node-0, 90 Gbit/s back" in found.measured
    fine = links.judge(network(400, star([90], [80])))
    assert grades(fine)[-1] == ("slow host", Grade.ok, ())


def test_ranks_that_cannot_connect_are_an_error_and_nothing_else_is_judged() -> None:
    lost = Network("gloo", 2, {"node-b": "connect timeout"})
    (found,) = links.judge(lost, CLUSTER)
    assert (found.grade, found.hosts) == (Grade.error, ("node-b",))
    assert "connect timeout" in found.measured and "firewall" in found.advice


def test_late_agreement_is_told() -> None:
    late = one(links.judge(replace(network(400), latency=0.02)), Grade.warning)
    assert late.check == "latency" and late.measured.startswith("20 ms")


def test_spans_of_numbers() -> None:
    assert span([1.0, 1.0], str) == "1.0" and span([2, 1, 3], str) == "1 to 3"
