"""wandb: tracked when it works, one warning when it does not, never an end to training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from nlscale.errors import UserError
from nlscale.telemetry.figures import read_records
from nlscale.telemetry.run import Telemetry, WandbOptions
from nlscale.telemetry.tracking import has_api_key

CALLS = ("init", "define_metric", "log", "finish")


def record(step: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "tokens": step,
        "loss": 2.0,
        "tokens_per_second": 1.0,
        "step_seconds": 1.0,
        "levels": {"slow": {"period": 4, "updates": 0, "grad_norm": None, "learning_rate": 0.1}},
    }


class FakeRun:
    """Records what is logged; the call named `broken` raises."""

    url = "https://example.invalid/run"

    def __init__(self, broken: str | None = None) -> None:
        self.broken = broken
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_codes: list[int] = []

    def _call(self, name: str) -> None:
        if name == self.broken:
            raise RuntimeError(f"{name} is broken\nsecond line")

    def define_metric(self, *_: Any, **__: Any) -> None:
        self._call("define_metric")

    def log(self, values: dict[str, Any]) -> None:
        self._call("log")
        self.logged.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self._call("finish")
        self.exit_codes.append(exit_code)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def fake_init(
    monkeypatch: pytest.MonkeyPatch, run: FakeRun, fails_online: bool = False
) -> list[dict[str, Any]]:
    inits: list[dict[str, Any]] = []

    def init(**arguments: Any) -> FakeRun:
        inits.append(arguments)
        run._call("init")
        if fails_online and arguments["mode"] == "online":
            raise ConnectionError("no route")
        return run

    monkeypatch.setattr(wandb, "init", init)
    return inits


def train(run_dir: Path, mode: str = "auto", steps: int = 3) -> None:
    with Telemetry(run_dir, steps, WandbOptions(enabled=True, mode=mode), {"a": 1}, 1) as telemetry:
        for step in range(1, steps + 1):
            telemetry.train_step(record(step))
        telemetry.finish({"steps": steps})


@pytest.mark.parametrize("broken", CALLS)
def test_a_broken_wandb_is_one_warning_and_the_run_goes_on(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_init(monkeypatch, FakeRun(broken))
    train(tmp_path)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert f"{broken} is broken" in warnings[0]
    assert "second line" not in warnings[0]
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "summary.json").exists()


def test_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    inits = fake_init(monkeypatch, run)
    train(tmp_path / "mine")
    assert inits[0]["mode"] == "offline"
    assert inits[0]["dir"] == str(tmp_path / "mine")
    assert inits[0]["name"] == "mine"
    assert inits[0]["config"] == {"a": 1}
    assert inits[0]["settings"].init_timeout <= 30
    first = run.logged[0]
    assert first["step"] == 1
    assert first["train/loss"] == 2.0
    assert first["levels/slow/learning_rate"] == 0.1
    assert "levels/slow/grad_norm" not in first, "what has no value is left out"
    assert run.summary == {"steps": 3}
    assert run.exit_codes == [0]


def test_disabled_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inits = fake_init(monkeypatch, FakeRun())
    Telemetry(tmp_path, 1, WandbOptions(), {}, 1).close()
    assert inits == []


def test_an_exception_marks_the_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    fake_init(monkeypatch, run)
    with (
        pytest.raises(ZeroDivisionError),
        Telemetry(tmp_path, 1, WandbOptions(enabled=True), {}, 1),
    ):
        _ = 1 / 0
    assert run.exit_codes == [1]


def test_auto_goes_online_with_a_key_and_offline_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    run = FakeRun()
    inits = fake_init(monkeypatch, run, fails_online=True)
    train(tmp_path)
    assert [arguments["mode"] for arguments in inits] == ["online", "offline"]
    assert "tracked offline" in capsys.readouterr().out
    assert len(run.logged) == 3


def test_a_real_server_that_does_not_answer_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("nlscale.telemetry.tracking._INIT_SECONDS", 3)
    train(tmp_path)
    output = capsys.readouterr().out
    assert "no connection" in output
    assert "warning" not in output
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_wandb_mode_decides_in_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    inits = fake_init(monkeypatch, FakeRun())
    train(tmp_path)
    assert [arguments["mode"] for arguments in inits] == ["offline"]


def test_online_without_a_key_never_asks_at_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inits = fake_init(monkeypatch, FakeRun())
    train(tmp_path, mode="online")
    assert [arguments["mode"] for arguments in inits] == ["offline"]
    assert "warning: wandb: no API key" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inits = fake_init(monkeypatch, FakeRun())
    train(tmp_path)
    train(tmp_path)
    assert inits[0]["id"] == inits[1]["id"]


def test_keys_are_found_in_netrc_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password " + "k" * 40 + "\n")
    path.chmod(0o600)
    assert not has_api_key()
    monkeypatch.setenv("NETRC", str(path))
    assert has_api_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert not has_api_key()


def test_an_unknown_mode_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="auto, online, offline, disabled"):
        train(tmp_path, mode="on")


DIES = """
import os, sys
from pathlib import Path
from nlscale.telemetry.run import Telemetry, WandbOptions
with Telemetry(Path("run"), 1, WandbOptions(enabled=True, mode="offline"), {}, 1) as telemetry:
    if sys.argv[1] == "killed":
        os._exit(9)
os._exit(0)  # as a process that was forked for a run of a sweep
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_wandb_leaves_nothing_in_the_temporary_folder(how: str, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    subprocess.run(
        [sys.executable, "-c", DIES, how],
        cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, timeout=120,
    )  # fmt: skip
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert not os.listdir(tmp_path / "tmp")
    assert how == "killed" or not (tmp_path / "run" / "wandb" / "tmp").exists()


def test_a_real_offline_run_leaves_a_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert "warning" not in capsys.readouterr().out
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    # wandb's own process writes the file, and may still be at it when the run has ended
    deadline = time.monotonic() + 30
    while b"levels/slow/learning_rate" not in files[0].read_bytes():
        assert time.monotonic() < deadline, "the record never reached the file"
        time.sleep(0.1)
