"""What settings of the levels cost and save, from runs that are too few for a law."""

from __future__ import annotations

import io
import json
import statistics
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from scaling.run_folders import finished_run
from scipy import stats

from nlscale.cli import main
from nlscale.config import recipe
from nlscale.levels.spectrum import levels_of
from nlscale.scaling.law.setting import setting_of

SETTINGS = {
    "1": "[1]",
    "1, 4": "[1,4]",
    "1, 4 int8": "[{period: 1, wire: int8},{period: 4, wire: int8}]",
}
RATES = {"1": "1e-3", "1, 4": "2e-3", "1, 4 int8": "4e-3"}
COSTS = {  # above the setting that sends most, of seeds 2 to 5
    "1, 4": (0.010, 0.014, 0.012, 0.011),
    "1, 4 int8": (0.03, -0.02, 0.01, 0.00),
}
BASE = (3.0, 3.1, 2.9, 3.05)


class Room:
    """A folder of runs, and what `nlscale fit --frontier` says of them."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.figure = folder / "runs", folder / "bytes.png"
        self._count = 0

    def run(self, loss: float, *overrides: str) -> None:
        self._count += 1
        finished_run(self.runs / str(self._count), 100, loss, *overrides)

    def pairs(self, seeds: int) -> None:
        """As many of each setting, with a rate that was chosen for it."""
        for index in range(seeds):
            for name, levels in SETTINGS.items():
                loss = BASE[index] + COSTS.get(name, BASE)[index] * (name in COSTS)
                rate = f"optimizer.learning_rate={RATES[name]}"
                self.run(loss, f"levels={levels}", rate, f"run.seed={index + 2}")

    def fit(self, *arguments: str, code: int = 0) -> str:
        """Standard output, or the line it ends with."""
        out, err = io.StringIO(), io.StringIO()
        command = ["fit", str(self.runs), "--frontier", str(self.figure), "--cluster", "two-nodes"]
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main([*command, *arguments])
        assert ended.value.code == code, err.getvalue()
        assert self.figure.read_bytes().startswith(b"\x89PNG")
        return err.getvalue() if code else out.getvalue()

    def savings(self) -> dict[str, dict[str, Any]]:
        network = json.loads(self.fit("--json"))["network"]
        return {saving["setting"]: saving for saving in network["savings"]}


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


@pytest.mark.parametrize(
    ("levels", "name"),
    [
        ("[1]", "1"),
        ("[1,4,16]", "1, 4, 16"),
        ("[{period: 1, hidden: 40},{period: 4, hidden: 40}]", "1, 4"),
        ("[{period: 1, hidden: 40},{period: 4, hidden: 80}]", "1 hidden 40, 4 hidden 80"),
        ("[1,{period: 4, parts: [cms, mixer]}]", "1 cms+embedding+head, 4 cms+mixer"),
        ("[{period: 1, wire: int8},{period: 4, wire: int8}]", "1, 4 int8"),
        ("[{period: 1, wire: int8},{period: 4, wire: int4}]", "1 int8; 4 int4"),
        ("[1,{period: 4, wire: bf16}]", "1 fp32; 4 bf16"),
        ("[1,{period: 4, outer: {every: 8}}]", "1; 4 outer every 8"),
        ("[{local: true, outer: {every: 30}, name: a}]", "all local every 30"),
        ("[{local: true, outer: {every: 30}, name: a, wire: int4}]", "all local every 30 int4"),
        (
            "[{local: true, name: a, outer: {every: 30, momentum: 0, learning_rate: 1}}]",
            "all local every 30 (momentum 0, rate 1)",
        ),
        ("[{period: 1, local: true, outer: {every: 30}},4]", "1 local every 30; 4"),
        (
            "{spectrum: [1,4], period_warmup: {steps: 10%, cooldown: 80%}}",
            "1, 4 + warm-up 10% + cool-down 80%",
        ),
        ("{spectrum: [1,4], reduction: every-step}", "1, 4 + reduced every step"),
        ("{spectrum: [1,4], stagger: false}", "1, 4 + unstaggered"),
        ("{spectrum: [1], stagger: false}", "1"),
    ],
)
def test_a_setting_is_named_by_what_decides_bytes(levels: str, name: str) -> None:
    config = recipe.load(None, ["data.dir=gone", "model.layers=2", f"levels={levels}"]).config
    assert setting_of(config, levels_of(config)) == name


def test_costs_are_means_over_pairs_by_seed_with_intervals_that_hold_together(room: Room) -> None:
    room.pairs(4)
    found = room.savings()
    assert list(found) == ["1, 4", "1, 4 int8"]
    student = stats.t.ppf(1 - 0.05 / 2 / 2, 3)  # of 4 pairs; two settings share the 5%
    for name, costs in COSTS.items():
        saving = found[name]
        assert (saving["reference"], saving["periods"]) == ("1", "1, 4")
        percent = [100 * cost / base for cost, base in zip(costs, BASE, strict=True)]
        for own, mean, interval in (
            (costs, saving["loss"], saving["interval"]),
            (percent, saving["relative"]["mean"], saving["relative"]["interval"]),
        ):
            half = student * statistics.stdev(own) / 2
            assert mean == pytest.approx(statistics.fmean(own))
            assert interval == pytest.approx([mean - half, mean + half])
        assert saving["costs"] == pytest.approx(costs, abs=1e-9)
        assert saving["interval_level"] == pytest.approx(0.975)
    rounded = found["1, 4 int8"]["fewer"] / found["1, 4"]["fewer"]
    assert rounded == pytest.approx(4 / (1 + 4 / 128))
    text = room.fit()
    assert "+0.0117" in text and "+0.39%" in text and "all together at 95%" in text
    assert "as many nodes as they were trained on: '1, 4 int8'\n" in text


def test_few_pairs_have_no_interval(room: Room) -> None:
    room.pairs(2)
    for saving in room.savings().values():
        assert saving["interval"] is None and saving["relative"]["interval"] is None
        assert saving["standard_error"] is not None
    assert "brackets" not in room.fit()


def test_runs_of_other_seeds_are_no_pairs(room: Room) -> None:
    room.run(3.0, "levels=[1]", "run.seed=1")
    room.run(9.0, "levels=[1]", "run.seed=2")
    room.run(3.5, "levels=[1,4]", "run.seed=1")
    room.run(3.5, "levels=[1,8]", "run.seed=3")
    assert room.savings()["1, 4"]["costs"] == pytest.approx([0.5])
    assert "1, 8 is not compared: it has no run of equal size" in room.fit()


def test_rates_keep_runs_apart_only_where_a_setting_has_several(room: Room) -> None:
    for levels, slower in (("[1]", 0.0), ("[1,4]", 0.1)):
        for rate, loss in (("1e-3", 3.0), ("2e-3", 5.0)):
            room.run(loss + slower, f"levels={levels}", f"optimizer.learning_rate={rate}")
    assert room.savings()["1, 4"]["costs"] == pytest.approx([0.1, 0.1])


def test_other_data_keep_runs_apart(room: Room) -> None:
    room.run(3.0, "levels=[1]")
    room.run(3.5, "levels=[1,4]", "data.dir=elsewhere")
    assert room.savings() == {}


def test_runs_of_a_search_are_left_out(room: Room) -> None:
    room.run(3.0, "levels=[1]")
    room.run(3.5, "levels=[1,4]")
    for rate in ("1e-3", "2e-3"):
        room.run(9.0, "levels=[1]", f"optimizer.learning_rate={rate}", "run.purpose=search")
    network = json.loads(room.fit("--json"))["network"]
    assert [run["loss"] for run in network["runs"]] == [3.5, 3.0]
    assert network["savings"][0]["costs"] == pytest.approx([0.5])


def test_without_a_law_it_says_why(room: Room) -> None:
    for index, levels in enumerate(("[1]", "[1,2,4,8]", "[1,4,16,64]")):
        room.run(3 + 0.01 * index, f"levels={levels}")
    text = room.fit()
    assert "No law is fitted: 3 runs: 3 points are too few for a law of 5 parameters" in text
    assert "1, 4, 16, 64" in text and str(room.figure) in text
    found = json.loads(room.fit("--json"))
    assert set(found) == {"not_fitted", "network"}
    assert "3 points are too few" in found["not_fitted"][""]
    # what only a law gives was asked for
    assert "3 points are too few" in room.fit("--budget", "1e18", code=2)
    assert "3 points are too few" in room.fit("--figure", str(room.figure), code=2)


def test_one_size_is_too_few_as_well(room: Room) -> None:
    for seed in range(8):
        room.run(3.0, "levels=[1]", f"run.seed={seed}")
    assert "No law is fitted: 8 runs: 1 distinct N are too few" in room.fit()
    room.run(3.0, "levels=[1]", "run.seed=8")
    assert "every run has the period 1" in room.fit("--period", code=2), "that is another error"


def test_a_family_without_a_law_is_named(room: Room) -> None:
    room.run(3.0, "levels=[1]", "model.mixer=attention")
    room.run(3.0, "levels=[1]", "model.mixer=hope")
    text = room.fit("--by", "model.mixer")
    assert "No law of attention is fitted: " in text and "No law of hope is fitted: " in text
