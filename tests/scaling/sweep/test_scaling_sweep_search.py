"""Sweeps that choose a setting on one seed, and run it on others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scaling.sweeps import WSD, make_data, write_sweep

from nlscale import cli
from nlscale.errors import UserError
from nlscale.scaling.sweep.branches import share_stable_phases
from nlscale.scaling.sweep.runs import expand
from nlscale.scaling.sweep.search import (
    Choices,
    choices,
    finalists,
    goes_on,
    lines,
    rounds_of,
)
from nlscale.scaling.sweep.spec import Search, Sweep, read_sweep
from nlscale.scaling.sweep.status import Status

RATES = {"key": "optimizer.learning_rate", "values": [1e12, 1e-2], "seed": 7, "length": 0.5}
"""The first diverges, as one of a search easily does."""
ROUNDS = RATES | {"values": [1e12, 1e-2, 1e-9], "length": 0.25, "rounds": 2}
FIVE = RATES | {"values": [1e-3, 2e-3, 4e-3, 8e-3, 9e-3], "length": 0.25, "rounds": 2, "keep": 2}


def nlscale(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    return ended.value.code, *capsys.readouterr()


def test_the_best_value_of_one_seed_is_run_on_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"model.mixer": ["attention"], "run.seed": [1]}
    sweep = write_sweep(tmp_path, make_data(tmp_path), axes, search=ROUNDS, set=WSD)
    code, out, _ = nlscale(capsys, "sweep", sweep, "--dry-run")
    assert code == 0 and "2 runs in" in out and "1 runs in" in out
    assert "Round 1 of 2 has not finished" in out

    code, out, err = nlscale(capsys, "sweep", sweep, "--json")
    assert code == 0, err
    found = json.loads(out)
    tried = {run["name"]: run for run in found["search"]["runs"]}
    assert tried.keys() == {
        f"{mixer}-learning_rate{rate}"
        for mixer in axes["model.mixer"]
        for rate in ("1000000000000.0", "0.01", "1e.09", "0.01-round2", "1e.09-round2")
    }
    assert [run["steps"] for run in tried.values()] == [2, 2, 2, 4, 4]  # quarter and half of 9
    for name, run in tried.items():
        first, dash, _ = name.rpartition("-round2")
        assert (run["begins_from"], run["begins_at_step"]) == ((first, 1) if dash else (None, 0))
    for run in found["runs"]:
        assert run["name"].endswith("learning_rate0.01") and run["steps"] == 9
        assert run["state"] == "finished"
    assert len(found["runs"]) == 1
    for mixer, order in found["chosen"].items():
        assert mixer in axes["model.mixer"]
        assert [name for name, _ in order] == ["learning_rate0.01", "learning_rate1e.09"]
        assert order[0][1] == tried[f"{mixer}-{order[0][0]}-round2"]["val_loss"]

    # a second time nothing is run, and what chose a value says so
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    code, again, _ = nlscale(capsys, "sweep", sweep, "--json")
    assert code == 0 and json.loads(again)["chosen"] == found["chosen"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    written = (tmp_path / "runs" / "search" / next(iter(tried)) / "config.yaml").read_text()
    assert "purpose: search" in written and "seed: 7" in written


ONE, TWO, FOUR, EIGHT, NINE = (f"learning_rate0.00{n}" for n in (1, 2, 4, 8, 9))
NAN = float("nan")


def read_search(folder: Path, **changes: Any) -> tuple[Sweep, Search]:
    axes = {"model.mixer": ["hope", "attention"], "run.seed": [1, 2]}
    sweep = read_sweep(write_sweep(folder, "gone", axes, **changes))
    assert sweep.search is not None
    return sweep, sweep.search


def pretended(losses: dict[str, dict[str, float]]) -> tuple[list[Any], dict[str, Any]]:
    """Runs of a round by mixer and rate, and where they stand, as if they had been trained."""
    runs, states = [], {}
    for mixer, of in losses.items():
        for rate, loss in of.items():
            axes = {"model.mixer": mixer, "optimizer.learning_rate": rate}
            runs.append(SimpleNamespace(name=f"{mixer}-{rate}", axes=axes))
            states[runs[-1].name] = Status(1, {"final_val_loss": loss})
    return runs, states


def rates(search: Search, found: Choices | None, most: int, mixer: str) -> list[str]:
    """Those that go on, of a mixer."""
    axes = [{"model.mixer": mixer, search.key: value.name} for value in search.values]
    return [each[search.key] for each in axes if goes_on(search, found, most, each)]


def test_the_better_half_goes_on_at_twice_the_length(tmp_path: Path) -> None:
    sweep, search = read_search(tmp_path, search=FIVE)
    assert [one.share for one in rounds_of(sweep, search)] == [0.25, 0.5]
    assert search.tried == [5, 3] and rates(search, None, 3, "hope") == [ONE, TWO, FOUR]
    losses = {
        "hope": {ONE: 1.0, TWO: NAN, FOUR: 3.0, EIGHT: NAN, NINE: NAN},
        "attention": {ONE: 3.0, TWO: 2.0, FOUR: 1.0, EIGHT: 4.0, NINE: 0.5},
    }
    runs, states = pretended(losses)
    found = choices(search, runs, states, [])
    assert rates(search, found, 3, "hope") == [ONE, FOUR], "the others have diverged"
    assert rates(search, found, 3, "attention") == [TWO, FOUR, NINE]
    assert found is not None
    places = finalists(sweep, search, found).places
    assert places == {
        f"{mixer}-seed{seed}-{rate}": place
        for mixer, kept in (("hope", (ONE, FOUR)), ("attention", (NINE, FOUR)))
        for place, rate in enumerate(kept, start=1)
        for seed in (1, 2)
    }
    assert "round 1 of 2: optimizer.learning_rate of hope" in lines(search, found, 1)[0]
    del losses["hope"][FOUR]
    with pytest.raises(UserError, match=r"1 of the values .* or keep 1"):
        choices(search, *pretended(losses), [])


def test_equal_runs_of_two_rounds_are_no_mistake(tmp_path: Path) -> None:
    """A half of 40 steps is a quarter of 80: the second run begins from the first."""
    axes = {"train.steps": [40, 80], "run.seed": [1]}
    keys = WSD | {"model.vocabulary": 64}
    sweep = read_sweep(write_sweep(tmp_path, "gone", axes, set=keys, search=FIVE))
    assert sweep.search is not None
    key = sweep.search.key
    first, second = (
        expand(one, wanted=lambda axes: axes[key] == ONE) for one in rounds_of(sweep, sweep.search)
    )
    states = {run.name: Status(0, None) for run in (*first, *second)}
    share_stable_phases(sweep, first, states)
    share_stable_phases(sweep, second, states, first)
    assert second[0].steps == first[1].steps == 20
    assert second[0].start is first[1] and second[0].start_step == 15
    assert second[1].start is second[0] and first[1].start is first[0]


def test_of_several_finalists_each_has_a_table(tmp_path: Path) -> None:
    asked = {"by": "model.mixer", "each": "data.dir"}
    sweep, _ = read_search(tmp_path, search=FIVE, compare=asked)
    assert sweep.compare is not None and sweep.compare.each == ["data.dir", "finalist"]
    sweep, _ = read_search(tmp_path, search=RATES | {"seed": 7}, compare=asked)
    assert sweep.compare is not None and sweep.compare.each == ["data.dir"]
    with pytest.raises(UserError, match="each finalist has a table"):
        read_search(tmp_path, search=FIVE, compare={"by": ["model.mixer", FIVE["key"]]})


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
        ({**FIVE, "rounds": 4}, {"run.seed": [1]}, "a length of 0.125 or less, or fewer rounds"),
        ({**FIVE, "rounds": 10**6}, {"run.seed": [1]}, "end beyond the length of a run"),
        ({**FIVE, "rounds": 3}, {"run.seed": [1]}, "3 rounds try 5, 3, 2 values, and 2 are kept"),
        (FIVE, {"run.seed": [1], "search.round": {"a": {"model.layers": 2}}}, "rename it"),
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
