"""`nlscale doctor` on one machine, as a user runs it; what can be wrong is made wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doctors import findings, run
from hangups import hears_hangups
from places import variables

from nlscale.cluster.doctor import disk
from nlscale.cluster.doctor.machine import Asked, examine
from nlscale.cluster.doctor.report import print_report
from nlscale.cluster.life.place import VARIABLES
from nlscale.data.build import build


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"text number {i}, " * 10)
    build([str(text)], "bytes", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_sound_machine_ends_with_0_and_plausible_numbers(tmp_path: Path, data: Path) -> None:
    runs = tmp_path / "new" / "runs"
    code, out, err = run("--path", str(runs), "--data", str(data), "--json")
    assert code == 0, out
    report, found = json.loads(out), findings(out)
    assert report["worst"] != "error" and report["hosts"] == [socket.gethostname()]
    (here,) = report["hosts"]
    assert report["measured"]["versions"][here]["torch"] == torch.__version__
    measured = report["measured"]["disk"][here]
    assert 1e6 < measured["write"] < 1e12 and 1e6 < measured["read"] < 1e12
    assert 0 < measured["tested"] <= 256_000_000
    assert measured["path"] == str(runs) and measured["rename"] is None
    assert 0 < measured["free"] <= measured["total"]
    assert "shards" in found["data"][0]["measured"] and found["data"][0]["grade"] == "ok"
    assert "network" not in report["measured"]
    assert not runs.parent.exists(), "what was made to measure in is removed"
    assert "disk at" in err, "progress is shown"
    to_mend = [one for each in found.values() for one in each if one["grade"] == "warning"]
    assert all(one["advice"] for one in to_mend)


def test_the_table_says_the_same_as_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")  # something to mend
    report = examine(Asked(tmp_path, None, None, 60.0), lambda text: None)
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    begun = [line.split() for line in lines if line[:1].strip()]
    findings = report.plain()["findings"]
    assert [words[0] for words in begun[:-1]] == [one["grade"] for one in findings]
    text = " ".join(" ".join(lines).split())
    for one in findings:
        assert f"{one['grade']} {one['check']} {one['measured']}" in text
        assert one["advice"] in text
    assert lines[-1].startswith(f"{socket.gethostname()}: 1 error")


def test_an_interface_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    code, out, _ = run("--path", str(tmp_path))
    assert code == 2
    line, advice = (" ".join(part.split()) for part in out.split("gloo address")[1].split("->")[:2])
    assert line == "GLOO_SOCKET_IFNAME=nowhere0, but there is no interface nowhere0"
    assert "GLOO_SOCKET_IFNAME" in advice


def test_a_path_that_cannot_be_made() -> None:
    code, out, _ = run("--path", "/proc/nlscale/runs", "--json")
    (found,) = findings(out)["disk"]
    assert code == 2 and found["grade"] == "error"
    assert "cannot write to /proc/nlscale/runs" in found["measured"] and found["advice"]


@pytest.mark.root
def test_a_file_system_that_is_full_or_read_only(small: Path) -> None:
    code, out, _ = run("--path", str(small), "--json")
    assert code == 2 and "of 4.19 MB free" in findings(out)["disk"][0]["measured"]
    assert "disk speed" not in findings(out), "no room to measure it"
    with open(small / "filler", "wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(bytes(5 << 20))
    code, out, _ = run("--path", str(small), "--json")
    (found,) = findings(out)["disk"]
    assert code == 2 and "(tmpfs): 0 B of 4.19 MB free" in found["measured"]
    assert "checkpoint.keep" in found["advice"]
    assert os.listdir(small) == ["filler"]
    subprocess.run(["mount", "-o", "remount,ro,size=3g", str(small)], check=True)
    code, out, _ = run("--path", str(small), "--json")
    (found,) = findings(out)["disk"]
    assert code == 2 and "Read-only file system" in found["measured"]


@pytest.mark.root
def test_a_disk_in_memory_is_no_place_for_checkpoints(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=3g", str(small)], check=True)
    measured = disk.probe(small)
    assert measured.kind == "tmpfs" and measured.write and measured.rename is None
    (found, *_) = disk.judge({"here": measured})
    assert found.grade == "warning" and "in memory" in found.measured
    assert os.listdir(small) == []


def test_data_that_are_not_whole(tmp_path: Path, data: Path) -> None:
    (data / "train-000000.tar").unlink()
    code, out, _ = run("--path", str(tmp_path), "--data", str(data), "--json")
    (found,) = findings(out)["data"]
    assert code == 2 and "train-000000.tar is missing" in found["measured"]
    assert "restore it" in found["advice"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_doctor_that_is_ended_leaves_no_file(tmp_path: Path, how: signal.Signals) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    doctor = subprocess.Popen(
        [sys.executable, "-m", "nlscale", "doctor", "--path", str(runs)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hears_hangups,
    )  # fmt: skip
    while not os.listdir(runs):
        assert doctor.poll() is None
        time.sleep(0.001)
    doctor.send_signal(how)
    _, said = doctor.communicate(timeout=60)
    left = [path for path in runs.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < 1000, "the large file had no name"
    if how != signal.SIGKILL:
        assert doctor.returncode == 130 and "interrupted" in said
        assert not os.listdir(runs)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--path", __file__], {}, "is a file; give the folder"),
        (["--timeout", "0"], {}, "above 0"),
        (["--cluster", "nowhere.yaml"], {}, "no cluster file at nowhere.yaml"),
        ([], variables(0, 4), "one of 4 ranks; add --nodes"),
        ([], {"WORLD_SIZE": "4"}, "RANK is not"),
        (["--nodes"], {}, "--nodes needs RANK, LOCAL_RANK"),
    ],
)
def test_what_is_wrongly_asked_is_refused_in_one_line(
    arguments: list[str],
    environment: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err
