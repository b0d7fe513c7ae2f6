"""What is judged of each host: limits, addresses, versions, GPUs, disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from doctors import CLUSTER, DISK, GPU, GPUS, HEALTH, NO_GPUS, OTHER, SOUND, grades, one

from nlscale.cluster.doctor import disk, environment, hardware, versions
from nlscale.cluster.doctor.disk import Disk
from nlscale.cluster.doctor.environment import Environment
from nlscale.cluster.doctor.findings import Grade
from nlscale.cluster.doctor.hardware import Hardware
from nlscale.cluster.life import open_files

PAIR = ("node-a", "node-b")


def pair(second: Any, first: Any = SOUND) -> dict[str, Any]:
    return {"node-a": first, "node-b": second}


def test_nothing_is_said_of_sound_nodes_but_that_they_are() -> None:
    found = environment.judge_limits(pair(OTHER), ranks=16, ranks_per_node=8)
    assert grades(found) == [
        ("open files", Grade.ok, ()),
        ("shared memory", Grade.ok, ()),
        ("threads", Grade.ok, ()),
    ]
    found = environment.judge_addresses(pair(OTHER))
    assert grades(found) == [("gloo address", Grade.ok, ())]


@pytest.mark.parametrize(
    ("change", "check", "advice"),
    [
        ({"shared_memory": 67_108_864}, "shared memory", "--shm-size"),
        ({"shared_memory": None}, "shared memory", "--shm-size"),
        ({"threads": 32}, "threads", "OMP_NUM_THREADS=4"),
        ({"threads": None}, "threads", "OMP_NUM_THREADS=4"),
        ({"own_cores": 1}, "threads", "--cpus-per-task=4"),
    ],
)
def test_limits_that_are_too_low_name_host_and_fix(
    change: dict[str, Any], check: str, advice: str
) -> None:
    found = environment.judge_limits(pair(replace(OTHER, **change)), ranks=16, ranks_per_node=8)
    low = one(found, Grade.warning)
    assert (low.check, low.hosts) == (check, ("node-b",))
    assert advice in low.advice


def test_only_the_hard_limit_of_open_files_can_be_too_low() -> None:
    soft = {"node-a": replace(SOUND, open_files=1024)}
    (finding, *_) = environment.judge_limits(soft, ranks=4096)
    assert finding.grade == Grade.ok
    assert "up to 65,536 (a shell has 1,024; a run raises it by itself)" in finding.measured
    few = pair(replace(OTHER, open_files=1024, most_open_files=4096))
    assert environment.judge_limits(few, ranks=512)[0].grade == Grade.ok
    low = one(environment.judge_limits(few, ranks=1024), Grade.error)
    wanted = open_files.needed(1024, store=True)
    assert (low.check, low.hosts) == ("open files", ("node-b",))
    assert f"the first of 1,024 ranks needs {wanted:,}" in low.measured
    assert f"ulimit -n {wanted}" in low.advice and "LimitNOFILE" in low.advice


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resolved": "127.0.1.1"}, "127.0.1.1"),
        ({"resolved": None, "usable": False}, "does not resolve"),
        ({"resolved": "198.51.100.9", "usable": False}, "no address of this machine"),
        ({"gloo_interface": "lo"}, "GLOO_SOCKET_IFNAME=lo"),
        ({"gloo_interface": "eth9"}, "no interface eth9"),
        ({"nccl_interface": "eth9"}, "NCCL_SOCKET_IFNAME=eth9"),
    ],
)
def test_an_address_that_others_cannot_reach_is_an_error(change: dict[str, Any], says: str) -> None:
    bad = one(environment.judge_addresses(pair(replace(OTHER, **change))), Grade.error)
    assert bad.hosts == ("node-b",)
    assert says in bad.measured
    assert "_SOCKET_IFNAME" in bad.advice and bad.advice.endswith(": ib0")


def test_the_loopback_is_enough_where_all_ranks_are_on_one_machine() -> None:
    local = replace(SOUND, resolved="127.0.1.1")
    same = environment.judge_addresses({"vm (node 0)": local, "vm (node 1)": local})
    assert grades(same) == [("gloo address", Grade.ok, ())]
    alone = one(environment.judge_addresses({"vm": local}), Grade.note)
    assert "for several, set GLOO_SOCKET_IFNAME" in alone.advice
    assert alone.advice.endswith(": ib0 (192.0.2.1)"), "docker0 joins no nodes"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [("ib", True), ("=ib0", True), ("=ib", False), ("^docker", True), ("^docker,ib", False)],
)
def test_nccl_patterns_are_read_as_nccl_reads_them(pattern: str, matches: bool) -> None:
    found = environment.judge_addresses({"node-a": replace(SOUND, nccl_interface=pattern)})
    assert (Grade.error not in {finding.grade for finding in found}) == matches


VERSIONS = {"nlscale": "0.1.0", "Python": "3.11.7", "torch": "2.13.0", "NCCL": "2.28.3"}


@pytest.mark.parametrize(
    ("name", "grade"), [("torch", Grade.error), ("NCCL", Grade.error), ("Python", Grade.warning)]
)
def test_the_node_with_another_version_is_named(name: str, grade: Grade) -> None:
    odd = {**VERSIONS, name: "1.0"}
    found = {"node-a": VERSIONS, "node-b": odd, "node-c": VERSIONS}
    differs = one(versions.judge(found, {host: [] for host in found}), grade)
    assert differs.hosts == ("node-b",)
    assert f"{name} 1.0, {VERSIONS[name]} on the other nodes" in differs.measured


def test_what_nlscale_requires_and_is_not_there_is_an_error() -> None:
    unmet = {"node-a": ["torch is 2.4.0, >=2.11 is needed"]}
    bad = one(versions.judge({"node-a": VERSIONS}, unmet), Grade.error)
    assert "torch is 2.4.0" in bad.measured and "pip install" in bad.advice


def gpus(**change: Any) -> Hardware:
    """Eight GPUs, the fourth of them otherwise."""
    odd = replace(GPU, health=replace(HEALTH, **change))
    return replace(GPUS, gpus=(*GPUS.gpus[:3], odd, *GPUS.gpus[4:]))


def test_gpus_are_counted_against_ranks() -> None:
    enough = hardware.judge(pair(GPUS, GPUS), 8, CLUSTER)
    assert grades(enough) == [("GPUs", Grade.ok, ())]
    assert "8 x NVIDIA H200, 140 GiB" in enough[0].measured
    too_few = one(hardware.judge({"node-a": GPUS}, 9), Grade.error)
    assert "9 ranks" in too_few.measured and "start 8 ranks" in too_few.advice
    assert "4 idle" in one(hardware.judge({"node-a": GPUS}, 4), Grade.note).advice
    none = one(hardware.judge({"node-a": NO_GPUS}, 4), Grade.note)
    assert "training runs on the CPU with gloo" in none.measured


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"torch": "2.13.0+cpu"}, "install a build of torch"),
        ({"visible": ""}, "CUDA_VISIBLE_DEVICES hides them"),
    ],
)
def test_gpus_that_torch_cannot_use_are_told(change: dict[str, Any], advice: str) -> None:
    unused = replace(NO_GPUS, listed=8, **change)
    found = one(hardware.judge({"node-a": unused}, None), Grade.warning)
    assert "nvidia-smi lists 8" in found.measured and advice in found.advice


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"used": 60 * 10**9}, "60 GB in use by others"),
        ({"memory_errors": 2}, "2 uncorrected memory errors"),
        ({"slowed": ("heat",)}, "held down by heat"),
    ],
)
def test_a_gpu_that_is_not_well_is_named(change: dict[str, Any], says: str) -> None:
    found = one(hardware.judge(pair(gpus(**change), GPUS), 8), Grade.warning)
    assert (found.check, found.hosts) == ("GPU health", ("node-b",))
    assert found.measured.startswith("GPU 3: ") and says in found.measured and found.advice


def test_nodes_with_other_gpus_are_named() -> None:
    without = one(hardware.judge({**pair(GPUS, GPUS), "node-c": NO_GPUS}, 8), Grade.error)
    assert (without.check, without.hosts) == ("GPUs alike", ("node-c",))
    old = replace(GPUS, gpus=(replace(GPU, name="NVIDIA A100"),) * 8)
    other = one(hardware.judge({**pair(GPUS, GPUS), "node-c": old}, 8), Grade.warning)
    assert other.hosts == ("node-c",) and "8 x NVIDIA A100" in other.measured


def test_less_than_the_cluster_file_promises() -> None:
    small = replace(GPUS, gpus=(replace(GPU, memory=80 * 2**30),) * 4)
    found = hardware.judge({"node-a": small}, 4, CLUSTER)
    said = [finding.measured for finding in found if finding.check == "cluster file"]
    assert len(said) == 2 and "here are 4" in said[0] and "here is one of 80.0" in said[1]


def test_what_nvidia_smi_says_is_read() -> None:
    text = (
        "GPU-1234, 580.95.05, 3, 0, 0x0000000000000001\n"
        "GPU-5678, 580.95.05, 91034, [N/A], 0x0000000000000068\n"
    )
    idle, hot = hardware.parse_smi(text).values()
    assert idle == replace(HEALTH, driver="580.95.05", used=3 * 2**20)
    assert hot.used == 91034 * 2**20 and hot.memory_errors is None
    assert hot.slowed == ("hardware slowdown", "heat")
    assert hardware.parse_smi("") == {}
    plain = {"gpus": [{"name": "a", "memory": 1, "health": None}], "cores": 1, "memory": 1}
    plain |= {"listed": 1, "torch": "2", "visible": None}
    assert Hardware.from_plain(plain).gpus == (replace(GPU, name="a", memory=1, health=None),)


@pytest.mark.parametrize(
    ("change", "grade", "says"),
    [
        ({"free": 10**8}, Grade.error, "checkpoint.keep"),
        ({"free": 10**10}, Grade.warning, "checkpoint.keep"),
        ({"free_inodes": 0}, Grade.error, "df -i"),
        ({"free_inodes": 5000}, Grade.warning, "df -i"),
        ({"trouble": "Permission denied"}, Grade.error, "another folder"),
        ({"kind": "tmpfs"}, Grade.warning, "put run.dir on a disk"),
        ({"kind": "overlay"}, Grade.warning, "mount a folder"),
        ({"rename": "renaming fails: Invalid cross-device link"}, Grade.error, "POSIX"),
        ({"write": 20e6}, Grade.warning, "take 10m00s to save"),
        ({"read": 20e6}, Grade.warning, "faster disk"),
    ],
)
def test_a_disk_that_is_not_for_checkpoints(
    change: dict[str, Any], grade: Grade, says: str
) -> None:
    found = one(disk.judge(pair(replace(DISK, **change), DISK)), grade)
    assert found.hosts == ("node-b",) and says in found.advice


def test_a_disk_far_behind_the_others_is_named() -> None:
    disks: dict[str, Disk] = {f"node-{i}": DISK for i in range(4)}
    disks["node-2"] = replace(DISK, write=3e8)
    behind = one(disk.judge(disks), Grade.warning)
    assert behind.hosts == ("node-2",)
    assert "300 MB/s" in behind.measured and "1.2 GB/s is usual" in behind.advice


def test_what_is_true_of_all_hosts_is_said_once() -> None:
    slow = replace(DISK, write=5e7)
    found = disk.judge({f"node-{i}": slow for i in range(64)})
    assert grades(found) == [("disk", Grade.ok, ()), ("disk speed", Grade.warning, ())]


def test_an_environment_is_looked_at_without_a_network() -> None:
    around = environment.probe()
    assert isinstance(around, Environment) and around.interfaces["lo"] == "127.0.0.1"
    assert 1 <= around.own_cores <= around.cores and around.open_files
