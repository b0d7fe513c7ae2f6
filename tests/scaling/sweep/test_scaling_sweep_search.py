"""Sweeps that choose a setting on one seed, and run it on others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scaling.sweeps import make_data, write_sweep

from nlscale import cli
from nlscale.errors import UserError
from nlscale.scaling.sweep.spec import read_sweep

RATES = {"key": "optimizer.learning_rate", "values": [1e12, 1e-2], "seed": 7, "length": 0.5}
"""The first diverges, as one of a search easily does."""


def nlscale(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    return ended.value.code, *capsys.readouterr()


def test_the_best_value_of_one_seed_is_run_on_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"model.mixer": ["attention"], "run.seed": [1, 2]}
    sweep = write_sweep(tmp_path, make_data(tmp_path), axes, search=RATES)
    code, out, _ = nlscale(capsys, "sweep", sweep, "--dry-run")
    assert code == 0 and "2 runs in" in out and "The search has not finished" in out

    code, out, err = nlscale(capsys, "sweep", sweep, "--json")
    assert code == 0, err
    found = json.loads(out)
    tried = {run["name"]: run for run in found["search"]["runs"]}
    assert tried.keys() == {
        f"{mixer}-learning_rate{rate}"
        for mixer in axes["model.mixer"]
        for rate in ("1000000000000.0", "0.01")
    }
    assert {run["steps"] for run in tried.values()} == {4}  # half of 9
    for run in found["runs"]:
        assert run["name"].endswith("learning_rate0.01") and run["steps"] == 9
        assert run["state"] == "finished"
    assert len(found["runs"]) == 2
    for mixer, order in found["chosen"].items():
        assert mixer in axes["model.mixer"]
        assert [name for name, _ in order] == ["learning_rate0.01", "learning_rate1000000000000.0"]
        assert order[0][1] == tried[f"{mixer}-{order[0][0]}"]["val_loss"]

    # a second time nothing is run, and what chose a value says so
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    code, again, _ = nlscale(capsys, "sweep", sweep, "--json")
    assert code == 0 and json.loads(again)["chosen"] == found["chosen"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    written = (tmp_path / "runs" / "search" / next(iter(tried)) / "config.yaml").read_text()
    assert "purpose: search" in written and "seed: 7" in written


@pytest.mark.parametrize(
    ("search", "axes", "says"),
    [
        ({**RATES, "seed": 2}, {"run.seed": [1, 2]}, "seed 2 is on the axis run.seed as well"),
        (RATES, {"model.mixer": ["hope"]}, "seeds of their own"),
        (RATES, {"run.seed": [1], "optimizer.learning_rate": [1e-3]}, "sets optimizer.learning"),
        ({**RATES, "keep": 2}, {"run.seed": [1]}, "of 2 values 2 are kept"),
        ({**RATES, "seed": 1}, {"run.seed": ["+1", 2]}, "seed 1 is on the axis run.seed"),
        (RATES, {"run.seed": {"a": {"model.layers": 2}}}, "seeds of their own"),
        ({**RATES, "values": [1e-3]}, {"run.seed": [1]}, "two values of it or more"),
        ({**RATES, "values": [1e-3, 1e-3]}, {"run.seed": [1]}, "twice"),
        ({**RATES, "length": 2}, {"run.seed": [1]}, "at most 1"),
        ({**RATES, "key": "optimizer.rate"}, {"run.seed": [1]}, "unknown key"),
        ({**RATES, "sed": 1}, {"run.seed": [1]}, "seed"),
        ([1], {"run.seed": [1]}, "write {key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_searches_that_cannot_be_are_refused(
    search: Any, axes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    sweep = write_sweep(tmp_path, "no-data", axes, search=search)
    with pytest.raises(UserError, match="search") as caught:
        read_sweep(sweep)
    assert says in str(caught.value) and "\n" not in str(caught.value)
