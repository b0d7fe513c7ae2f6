"""`nlscale doctor --nodes`: ranks of this machine that count as several nodes."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import world
from doctors import Ended, as_rank, findings, run

from nlscale.cluster.doctor import clocks, environment, network, shared_files
from nlscale.cluster.doctor.arrivals import Arrival
from nlscale.cluster.doctor.clocks import Offset
from nlscale.cluster.doctor.meeting import meet
from nlscale.cluster.life.place import place

NO_CHANGES: dict[int, dict[str, str]] = {}


def test_two_nodes_of_two_ranks_are_measured_together(tmp_path: Path) -> None:
    arguments = ["--path", str(tmp_path / "runs"), "--json"]
    ended = world.run(4, as_rank, arguments, NO_CHANGES, ranks_per_node=2)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert [bool(out) for _, out, _ in ended] == [True, False, False, False]
    report, found = json.loads(ended[0][1]), findings(ended[0][1])
    here = socket.gethostname()
    hosts = [f"{here} (node 0)", f"{here} (node 1)"]
    assert (report["hosts"], report["ranks"]) == (hosts, 4)
    assert found["ranks"][0]["measured"] == "4 ranks on 2 nodes"
    assert found["shared folder"][0]["grade"] == "ok"
    measured = report["measured"]
    assert list(measured["disk"]) == list(measured["versions"]) == hosts
    offset = measured["clocks"][hosts[1]]
    assert abs(offset["seconds"]) <= offset["round_trip"], "it is the same clock"
    seen = measured["network"]
    assert seen["backend"] == "gloo" and list(seen["within"]) == hosts
    assert (seen["across"]["ranks"], seen["everyone"]["ranks"]) == (2, 4)
    for all_reduce in (*seen["within"].values(), seen["across"], seen["everyone"]):
        assert all(spent > 0 for spent in all_reduce["seconds"].values())
    assert {(link["sender"], link["receiver"]) for link in seen["links"]} == {
        (hosts[0], hosts[1]), (hosts[1], hosts[0])
    }  # fmt: skip
    assert seen["latency"] > 0 and all(link["gbit"] > 0 for link in seen["links"])
    assert not (tmp_path / "runs").exists()


def test_the_table_names_both_nodes(tmp_path: Path) -> None:
    ended = world.run(2, as_rank, ["--path", str(tmp_path)], NO_CHANGES, ranks_per_node=1)
    _, text, progress = ended[0]
    assert "2 ranks on 2 nodes" in text.splitlines()[-1]
    assert "Gbit/s with gloo, one rank on each of 2 nodes" in text
    assert "bandwidth across the nodes" in progress
    assert ended[1] == (0, "", ""), "the first rank speaks for all"


def test_one_node_of_several_ranks_has_nothing_between_nodes(tmp_path: Path) -> None:
    ended = world.run(2, as_rank, ["--path", str(tmp_path), "--json"], NO_CHANGES)
    found = findings(ended[0][1])
    assert [code for code, _, _ in ended] == [0, 0]
    assert "within a node" in found and "latency" in found
    assert not {"across nodes", "slow host", "clocks", "shared folder"} & set(found)


def test_missing_ranks_are_named_by_rank_and_host(tmp_path: Path) -> None:
    half = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    arguments = ["--path", str(tmp_path), "--timeout", "5", "--json"]
    ended = world.run(2, as_rank, arguments, {0: half, 1: half})
    assert [code for code, _, _ in ended] == [2, 2]
    (missing,) = findings(ended[0][1])["ranks"]
    assert missing["grade"] == "error"
    assert "2 of 4 ranks came within 5 s. Missing: ranks 2-3 of node 1 (gpu2" in missing["measured"]
    assert f"Here: ranks 0-1 on {socket.gethostname()}" in missing["measured"]
    assert ended[1][1:] == ("", "")


def test_a_wrong_interface_is_found_before_anything_connects(tmp_path: Path) -> None:
    changes = {1: {"GLOO_SOCKET_IFNAME": "nowhere0"}}
    arguments = ["--path", str(tmp_path), "--json"]
    ended = world.run(2, as_rank, arguments, changes, ranks_per_node=1)
    assert [code for code, _, _ in ended] == [2, 2]
    found = findings(ended[0][1])
    (bad,) = [one for one in found["gloo address"] if one["grade"] == "error"]
    assert bad["hosts"] == [f"{socket.gethostname()} (node 1)"]
    assert "no interface nowhere0" in bad["measured"]
    assert found["network"][0]["grade"] == "note" and "latency" not in found


def test_a_first_node_whose_name_does_not_resolve(tmp_path: Path) -> None:
    wrong = {"MASTER_ADDR": "node-a.invalid"}
    arguments = ["--path", str(tmp_path), "--json"]
    first, second = world.run(2, as_rank, arguments, {0: wrong, 1: wrong}, ranks_per_node=1)
    assert (first[0], second[0]) == (2, 2)
    (finding,) = findings(first[1])["ranks"]
    assert "MASTER_ADDR 'node-a.invalid' does not resolve" in finding["measured"]
    assert "/etc/hosts" in finding["advice"]
    assert second[1] == "" and second[2].count("\n") == 1
    assert f"rank 1 on {socket.gethostname()}: MASTER_ADDR" in second[2]


def test_ranks_that_are_not_placed_node_after_node(tmp_path: Path) -> None:
    changes = {1: {"LOCAL_RANK": "0"}, 2: {"LOCAL_RANK": "1"}}
    arguments = ["--path", str(tmp_path), "--json"]
    ended = world.run(4, as_rank, arguments, changes, ranks_per_node=2)
    assert [code for code, _, _ in ended] == [2] * 4
    (finding,) = findings(ended[0][1])["ranks"]
    assert "rank 1 is LOCAL_RANK 0" in finding["measured"]
    assert "--distribution=block" in finding["advice"]


def _stops_answering(path: Path) -> Ended | None:
    """Rank 1 arrives, and is gone."""
    if os.environ["RANK"] == "0":
        return run("--nodes", "--path", str(path), "--timeout", "5", "--json")
    here, around = place(), environment.probe()
    arrival = Arrival(around.hostname, here.local_rank, here.local_world)
    meet(here, 30).gather("arrival", [asdict(arrival), asdict(around)], [0, 1])
    return None


def test_a_rank_that_stops_answering_is_named(tmp_path: Path) -> None:
    ended, _ = world.run(2, _stops_answering, tmp_path, ranks_per_node=1)
    assert ended[0] == 2
    found = findings(ended[1])
    (lost,) = [one for one in found["ranks"] if one["grade"] == "error"]
    assert "rank 1 stopped answering in the check of versions" in lost["measured"]
    assert lost["hosts"] == [f"{socket.gethostname()} (node 1)"]
    assert "not measured" in found["network"][0]["measured"]
    assert found["disk"][0]["grade"] != "error", "the other checks are made all the same"


def _not_shared(path: Path) -> Ended:
    """Rank 1 has another disk under the same name, as a node has without a shared one."""
    if os.environ["RANK"] == "1":
        new_namespace = 0x20000  # CLONE_NEWNS: mounts of this process are its own
        assert ctypes.CDLL(None, use_errno=True).unshare(new_namespace) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(path)], check=True)
    return run("--nodes", "--path", str(path), "--json")


@pytest.mark.root
def test_a_folder_that_is_not_shared_is_found_and_the_node_named(tmp_path: Path) -> None:
    first, second = world.run(2, _not_shared, tmp_path, ranks_per_node=1)
    assert (first[0], second[0]) == (2, 2)
    (finding,) = findings(first[1])["shared folder"]
    assert finding["grade"] == "error" and "is not there" in finding["measured"]
    assert finding["hosts"] == [f"{socket.gethostname()} (node 1)"]
    assert "checkpoints need a folder that all nodes share" in finding["advice"]


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    def later() -> None:
        time.sleep(0.3)
        shared_files.show(tmp_path / "late", "token")

    writing = threading.Thread(target=later)
    writing.start()
    assert shared_files.look(tmp_path / "late", "token", wait=30) is None
    writing.join()
    assert shared_files.look(tmp_path / "late", "other", wait=0.1) == "has other contents"
    assert shared_files.look(tmp_path / "never", "token", wait=0.1) == "is not there"


def _skewed(ahead: float) -> Offset | None:
    """Rank 1's clock is ahead."""
    meeting = meet(place(), 30)
    skew = ahead if meeting.place.rank == 1 else 0.0
    offset = clocks.measure(meeting, [0, 1], lambda: time.time() + skew)
    meeting.leave(0)
    return offset


def test_a_clock_that_is_off_is_measured_to_its_round_trip() -> None:
    nothing, offset = world.run(2, _skewed, 7.2)
    assert nothing is None
    assert abs(offset.seconds - 7.2) <= offset.round_trip
    assert clocks.judge({"other": offset}, "first")[0].measured == "7.2 s ahead of first"


def _does_not_join() -> str | None:
    """Rank 1 meets, and does not come to the network."""
    meeting = meet(place(), 5)
    if meeting.place.rank == 1:
        return None
    return network.measure(meeting, [[0], [1]], lambda text: None)["trouble"]


def test_gloo_that_cannot_connect_is_told_instead_of_a_traceback() -> None:
    trouble, _ = world.run(2, _does_not_join)
    assert trouble


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_something_else_uses(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _stand(monkeypatch, rank, port)
        code, out, err = run("--nodes", "--timeout", "1")
    assert (code, out) == (2, "")
    says = "cannot listen on MASTER_PORT" if rank == 0 else "something else listens there"
    assert says in err and str(port) in err and "another" in err


def test_a_first_rank_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    _stand(monkeypatch, 1, port)
    code, _, err = run("--nodes", "--timeout", "1")
    assert code == 2 and err.count("\n") == 1
    assert f"cannot reach the first rank at 127.0.0.1:{port}" in err and "1 s" in err
    assert "this machine itself" in err, "localhost is the classical mistake"


def _stand(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
