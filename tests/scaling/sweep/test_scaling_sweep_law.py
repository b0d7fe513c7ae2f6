"""From a sweep file to a law: a small sweep, killed half way, run again, fitted and drawn."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from scaling.sweeps import WSD, finished_runs, make_data, start, write_sweep

from nlscale.cli import main
from nlscale.verify.resume import family

AXES = {
    "model.mixer": ["hope", "attention"],
    "size": {
        "small": {"model.d_model": 16, "model.layers": 1},
        "middle": {"model.d_model": 32, "model.layers": 1},
        "large": {"model.d_model": 48, "model.layers": 2},
    },
    "tokens": ["4k", "8k", "16k"],
}


def test_a_sweep_killed_half_way_ends_in_a_law_and_its_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    data = make_data(tmp_path / "text")
    keys = WSD | {"levels": [1, 4], "optimizer.learning_rate": 3e-3, "checkpoint.every": "20 steps"}
    sweep = write_sweep(tmp_path, data, AXES, set=keys)
    process = start(sweep)
    while len(finished_runs(sweep)) < 9:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    kept = {name: summary(tmp_path, name).stat().st_mtime_ns for name in finished_runs(sweep)}
    assert 9 <= len(kept) < 18
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(sweep)])
    assert ended.value.code == 0
    assert len(finished_runs(sweep)) == 18
    assert kept == {name: summary(tmp_path, name).stat().st_mtime_ns for name in kept}
    for mixer in AXES["model.mixer"]:
        for size in AXES["size"]:
            losses = [val_loss(tmp_path, f"{mixer}-{size}-{n}") for n in AXES["tokens"]]
            assert losses == sorted(losses, reverse=True), "more tokens, less loss"
    capsys.readouterr()
    figure = tmp_path / "law.png"
    drawn = ["--figure", str(figure), "--bootstraps", "40"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", str(tmp_path / "runs"), "--by", "model.mixer", "--json", *drawn])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)["families"]
    assert {name: one["points"] for name, one in found.items()} == {"hope": 9, "attention": 9}
    assert all(one["parameters"]["beta"] > 0 for one in found.values())
    assert figure.read_bytes().startswith(b"\x89PNG")


def summary(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "summary.json"


def val_loss(folder: Path, name: str) -> float:
    return float(json.loads(summary(folder, name).read_text())["final_val_loss"])
