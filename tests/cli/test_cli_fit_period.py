"""`nlscale fit --period` and `--parameters`: which columns they read, and what they say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nlscale.cli import main
from nlscale.scaling import Law

TRUTH = Law.of(1.69, 406.4, 410.7, 0.34, 0.28, 0.006)
LEVELS = {"1": [1], "1, 4, 16": [1, 4, 16], "1, 8, 64": [1, 8, 64]}
MEAN = {"1": 1, "1, 4, 16": 4, "1, 8, 64": 8}
Fit = Callable[..., str]


def rows() -> list[tuple[float, float, float, str]]:
    """N, D, loss and the periods of the levels."""
    rng = np.random.default_rng(0)
    sizes, tokens = np.geomspace(5e7, 5e9, 4), np.geomspace(1e9, 1e11, 4)
    found = []
    for n, d, periods in itertools.product(sizes, tokens, LEVELS):
        loss = TRUTH.loss(n, d, MEAN[periods]) * np.exp(0.002 * rng.normal())
        found.append((n, d, float(loss), periods))
    return found


@pytest.fixture
def fit(capsys: pytest.CaptureFixture[str]) -> Fit:
    """Standard output of a fit that ends well, else the error."""

    def run(*arguments: str | Path, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["fit", *map(str, arguments), "--bootstraps", "40"])
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        assert code == 0 or err.count("\n") == 1
        return err if code else out

    return run


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    lines = [f"{n},{d},{loss},{MEAN[periods]}" for n, d, loss, periods in rows()]
    path.write_text("\n".join(["N,D,loss,C", *lines]))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for index, (n, d, loss, periods) in enumerate(rows()):
        run = folder / f"run{index:02}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"model: {{layers: {2 + index % 3}}}\n")
        summary = {
            "parameters": int(n), "parameters_non_embedding": int(0.7 * n), "tokens": int(d),
            "final_val_loss": loss, "flops": 7 * int(n) * int(d),
            "levels": [{"period_steps": period} for period in LEVELS[periods]],
        }  # fmt: skip
        (run / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_column_c_is_the_period(fit: Fit, csv: Path) -> None:
    found = json.loads(fit(csv, "--period", "--json"))
    assert set(found["parameters"]) == {"E", "A", "B", "alpha", "beta", "G"}
    low, high = found["intervals"]["G"]
    assert low < 0.006 < high and low < found["parameters"]["G"] < high
    assert set(found["period"]) == {"flops", "settings"}
    first, second, third = found["period"]["settings"]
    assert set(first) == {
        "period", "periods", "runs", "loss", "loss_interval", "worth", "worth_interval", "beyond",
        "residual",
    }  # fmt: skip
    assert [s["period"] for s in (first, second, third)] == pytest.approx([1, 4, 8])
    assert (first["loss"], first["worth"], first["periods"]) == (0, pytest.approx(1), None)
    assert second["loss"] == pytest.approx(2 * found["parameters"]["G"])
    assert third["worth"] < second["worth"] < 1
    # a column C that is not asked for may be anything, such as compute
    assert json.loads(fit(csv, "--json"))["period"] is None


def test_of_runs_it_is_the_geometric_mean_of_their_levels(fit: Fit, csv: Path, runs: Path) -> None:
    of_runs, of_csv = (json.loads(fit(x, "--period", "--json")) for x in (runs, csv))
    assert of_runs["parameters"]["G"] == pytest.approx(of_csv["parameters"]["G"], rel=1e-3)
    settings = of_runs["period"]["settings"]
    assert [s["periods"] for s in settings] == list(LEVELS)
    assert [s["period"] for s in settings] == pytest.approx([1, 4, 8])


def test_periods_that_vary_unasked_are_warned_about(fit: Fit, runs: Path) -> None:
    plain = json.loads(fit(runs, "--json"))
    assert any("fit it with --period" in line for line in plain["warnings"])
    asked = json.loads(fit(runs, "--json", "--period"))
    assert not any("--period" in line for line in asked["warnings"])
    one = json.loads(fit(runs, "--json", "--where", "periods=1"))
    assert not any("--period" in line for line in one["warnings"])


def test_the_table_and_the_figure_show_what_periods_cost(fit: Fit, runs: Path) -> None:
    out = runs.parent / "law.png"
    text = fit(runs, "--period", "--figure", out)
    assert "+ G log2(period), nats per token" in text and "…" not in text
    line = next(line for line in text.splitlines() if line.startswith(" 1, 8, 64"))
    assert line.split()[3:5] == ["8", "16"] and "%" in line
    assert out.read_bytes().startswith(b"\x89PNG")


def test_families_of_which_one_has_no_slow_levels_are_compared(fit: Fit, runs: Path) -> None:
    for config in runs.rglob("config.yaml"):
        summary = json.loads((config.parent / "summary.json").read_text())
        mixer = "attention" if len(summary["levels"]) == 1 else "hope"
        config.write_text(f"model: {{mixer: {mixer}}}\n")
    out = runs.parent / "families.png"
    found = json.loads(fit(runs, "--period", "--json", "--by", "model.mixer", "--figure", out))
    assert found["families"]["attention"]["period"] is None
    assert len(found["families"]["hope"]["period"]["settings"]) == 2
    assert "no run has period 1" in found["families"]["hope"]["warnings"][0]
    # one law made them all
    inside = [m["value"] for m in found["multiplier"] if m["beyond"] is None]
    assert inside == pytest.approx([1.0] * len(inside), abs=0.25) and inside
    assert out.read_bytes().startswith(b"\x89PNG")


def test_parameters_without_the_embedding_can_be_chosen(fit: Fit, runs: Path, csv: Path) -> None:
    plain = json.loads(fit(runs, "--period", "--json"))
    fewer = json.loads(fit(runs, "--period", "--json", "--parameters", "non-embedding"))
    assert fewer["measured"]["N"] == pytest.approx([0.7 * n for n in plain["measured"]["N"]])
    assert fewer["flops_per_parameter_token"] == pytest.approx(10, rel=1e-6)
    # A / N^alpha is the same at 0.7 N
    ratio = fewer["parameters"]["A"] / plain["parameters"]["A"]
    assert ratio == pytest.approx(0.7 ** plain["parameters"]["alpha"], rel=1e-3)
    assert "N without the embedding: 48 points" in fit(runs, "--parameters", "non-embedding")
    missing = fit(csv, "--parameters", "non-embedding", code=2)
    assert "no column N_non_embedding; there are N, D, loss, C" in missing


def test_what_is_not_recorded_is_named(fit: Fit, runs: Path, csv: Path) -> None:
    csv.write_text(csv.read_text().replace(",C", ",period", 1))
    assert "no column C; there are N, D, loss, period" in fit(csv, "--period", code=2)
    csv.write_text(csv.read_text().replace(",period", ",C", 1) + "\n1e9,1e10,3,0.5")
    assert "row 50: C is 0.5; a period is at least 1 step" in fit(csv, "--period", code=2)
    summary = runs / "run05" / "summary.json"
    kept = json.loads(summary.read_text())
    del kept["levels"], kept["parameters_non_embedding"]
    summary.write_text(json.dumps(kept))
    assert "run05: its summary.json has no levels, which C is made of" in fit(
        runs, "--period", code=2
    )
    error = fit(runs, "--parameters", "non-embedding", code=2)
    assert "run05: its summary.json has no parameters_non_embedding" in error
    assert json.loads(fit(runs, "--json"))["points"] == 48


def test_one_period_is_not_enough(fit: Fit, runs: Path) -> None:
    error = fit(runs, "--period", "--where", "periods=1, 8, 64", code=2)
    assert "every run has the period 8" in error and "without --period" in error
