"""`nlscale fit`: what it reads, prints, draws and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.cli import main
from nlscale.scaling import Law

FEW = ("--bootstraps", "40")
LAW = Law.of(1.69, 406.4, 410.7, 0.34, 0.28)


def lines(law: Law = LAW, seed: int = 0, noise: float = 0.003) -> list[tuple[float, float, float]]:
    """N, D, loss of seven sizes at each of five budgets, 1e18 to 1e20 FLOPs."""
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e18, 1e20, 5), 7)
    n = LAW.optimum(flops)[0] * np.tile(np.geomspace(0.2, 5, 7), 5)
    loss = law.loss(n, flops / 6 / n) * np.exp(noise * rng.normal(size=35))
    return list(zip(n, flops / 6 / n, loss, strict=True))


class Room:
    """A folder with a CSV file in it, and the command run on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.csv = folder / "runs.csv"
        self.write([f"{n},{d},{loss}" for n, d, loss in lines()])

    def write(self, rows: list[str], header: str = "N,D,loss") -> None:
        self.csv.write_text("\n".join([header, *rows]) + "\n")

    def fit(self, *arguments: str, code: int = 0, of: Path | None = None) -> str:
        """Standard output of a fit that ends well, else the error; `err` has standard error."""
        with pytest.raises(SystemExit) as ended:
            main(["fit", str(of or self.csv), *FEW, *arguments])
        out, self.err = self._capsys.readouterr()
        assert ended.value.code == code, self.err
        assert code == 0 or self.err.count("\n") == 1
        self.printed = out
        return self.err if code else out

    def json(self, *arguments: str, of: Path | None = None) -> dict[str, Any]:
        return json.loads(self.fit("--json", *arguments, of=of))


@pytest.fixture
def room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Room:
    return Room(tmp_path, capsys)


def test_json_keys_and_how_they_hang_together(room: Room) -> None:
    found = room.json("--budget", "5e19", "--budget", "1e21")
    assert set(found) == {
        "parameters", "intervals", "interval_level", "resamples", "resamples_unconverged",
        "objective", "delta", "points", "measured", "converged", "gradient", "starts",
        "starts_agreeing", "condition", "optimal", "exponents", "isoflop", "envelope",
        "sensitivity", "period", "ill_conditioned", "flops_per_parameter_token", "warnings",
    }  # fmt: skip
    assert set(found["parameters"]) == set(found["intervals"]) == {"E", "A", "B", "alpha", "beta"}
    for name, (low, high) in found["intervals"].items():
        assert low < found["parameters"][name] < high
    assert (found["points"], found["interval_level"], found["resamples"]) == (35, 0.9, 40)
    assert found["converged"] is True and found["ill_conditioned"] is None
    alpha, beta = found["parameters"]["alpha"], found["parameters"]["beta"]
    assert found["exponents"]["a"] == pytest.approx(beta / (alpha + beta))
    assert found["exponents"]["a"] + found["exponents"]["b"] == pytest.approx(1)
    assert found["isoflop"]["a"] == pytest.approx(found["exponents"]["a"], abs=0.1)
    assert [s["left_out"] for s in found["sensitivity"]] == [1, 2, 4, 8]
    inside, beyond = found["optimal"]
    assert set(inside) == {"flops", "N", "D", "loss", "intervals", "extrapolation", "refused"}
    assert inside["extrapolation"] is None and inside["refused"] is None
    assert beyond["extrapolation"]["flops"] == pytest.approx(10)
    assert 6 * beyond["N"] * beyond["D"] == pytest.approx(1e21)
    for name in ("N", "D", "loss"):
        low, high = beyond["intervals"][name]
        assert low < beyond[name] < high


def test_the_table_says_the_law_and_what_is_extrapolated(room: Room) -> None:
    text = room.fit("--budget", "1e21")
    assert "extrapolated: flops 10x" in text and "35 points" in text and "…" not in text
    for name in ("E", "alpha", "parametric", "isoFLOP", "envelope", "starts agree"):
        assert name in text
    assert "ill-conditioned" not in text


def test_245_rows_with_300_resamples_converge(room: Room) -> None:
    rng = np.random.default_rng(1)
    n, d = np.exp(rng.uniform(18, 23, 245)), np.exp(rng.uniform(20, 26, 245))
    loss = LAW.loss(n, d) * np.exp(0.01 * rng.normal(size=245))
    room.write([f"{a},{b},{c}" for a, b, c in zip(n, d, loss, strict=True)])
    found = room.json("--bootstraps", "300")
    assert (found["points"], found["resamples"]) == (245, 300)
    assert found["converged"] and found["resamples_unconverged"] <= 3


def test_columns_select_and_compare_families(room: Room) -> None:
    better = Law.of(1.69, 0.8 * 406.4, 0.8 * 410.7, 0.34, 0.28)
    rows = [f"old, {n},{d},{loss}" for n, d, loss in lines()]
    rows += [f"new, {n},{d},{loss}" for n, d, loss in lines(better, seed=1)]
    room.write(rows, "family, N, D, loss")
    figure = room.folder / "new" / "families.png"
    both = room.json("--by", "family", "--figure", str(figure))
    assert set(both) == {"by", "families", "multiplier"} and set(both["families"]) == {"old", "new"}
    assert figure.read_bytes().startswith(b"\x89PNG")
    for m in both["multiplier"]:
        assert m["reference"] == "old" and m["family"] == "new" and m["beyond"] is None
        assert m["value"] == pytest.approx(0.8 ** -(1 / 0.34 + 1 / 0.28), rel=0.2)
    assert room.json("--where", "family=new") == both["families"]["new"]
    assert "at equal loss" in room.fit("--by", "family")
    assert "there are old, new" in room.fit("--where", "family=hope", code=2)
    assert "no column 'kind'; there are family, N, D, loss" in room.fit("--by", "kind", code=2)
    assert "has one value, new" in room.fit("--where", "family=new", "--by", "family", code=2)


def test_the_figure_is_drawn(room: Room) -> None:
    out = room.folder / "new" / "law.png"
    assert str(out) in room.fit("--figure", str(out), "--budget", "1e22")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "law.what" in room.fit("--figure", str(room.folder / "law.what"), code=2)


def run_folder(folder: Path, n: float, d: float, loss: float | None, layers: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: {{layers: {layers}, mixer: hope}}\n")
    summary = {"parameters": int(n), "tokens": int(d), "final_val_loss": loss}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_runs_are_read_and_unfinished_ones_named(room: Room) -> None:
    sweep = room.folder / "sweep"
    for index, (n, d, loss) in enumerate(lines()):
        run_folder(sweep / f"run{index:02}", n, d, loss, layers=index % 2)
    run_folder(sweep / "diverged", 1e7, 1e9, None, layers=1)
    (sweep / "started").mkdir()
    (sweep / "started" / "config.yaml").write_text("model: {layers: 2}\n")
    found = room.json(of=sweep)
    assert found["points"] == 35
    assert found["parameters"]["alpha"] == pytest.approx(
        room.json()["parameters"]["alpha"], rel=1e-3
    )
    assert room.json("--where", "model.layers=0", of=sweep)["points"] == 18
    room.fit(of=sweep)
    assert "started is left out: it has no summary.json" in room.err
    assert "diverged is left out: final_val_loss is None" in room.err and room.err.count("\n") == 2


def test_no_finished_run_is_said(room: Room) -> None:
    assert "no finished run in" in room.fit(of=room.folder, code=2)


@pytest.mark.parametrize(
    ("header", "row", "says"),
    [
        ("N,tokens,loss", "1,2,3", "no column D; there are N, tokens, loss"),
        ("n,d,l", "1,2,3", "no column N, D, loss; there are n, d, l"),
        ("N,D,loss", "1e8,many,3", "row 37: D is 'many', which is not a number"),
        ("N,D,loss", "1e8,,3", "row 37: D is '', which is not a number"),
        ("N,D,loss", "1e8", "row 37: D is '', which is not a number"),
        ("N,D,loss", "1e8,-5,3", "row 37: D is -5; it must be finite and above 0"),
        ("N,D,loss", "0,1e9,3", "row 37: N is 0; it must be finite and above 0"),
        ("N,D,loss", "1e8,1e9,nan", "row 37: loss is nan; it must be finite and above 0"),
        ("N,D,loss", "1e8,1e9,3,4", "row 37: more values than the 3 columns"),
    ],
)
def test_a_wrong_file_is_explained(room: Room, header: str, row: str, says: str) -> None:
    room.write([*(f"{n},{d},{loss}" for n, d, loss in lines()), row], header)
    assert says in room.fit(code=2)


def test_a_missing_file_is_named(room: Room) -> None:
    room.csv.unlink()
    assert f"cannot read {room.csv}" in room.fit(code=2)


def test_too_few_points_are_refused(room: Room) -> None:
    rows = [f"{n},{d},{loss}" for n, d, loss in lines()]
    room.write(rows[:7])
    assert "7 points are too few" in room.fit(code=2)
    room.write([f"{1e8 * (1 + i % 2)},{d},{loss}" for i, (_, d, loss) in enumerate(lines())])
    assert "2 distinct N are too few" in room.fit(code=2)


def test_an_ill_conditioned_fit_refuses_to_extrapolate(room: Room) -> None:
    n = np.geomspace(1e8, 1e10, 12)
    losses = LAW.loss(n, 20 * n) * np.exp(0.002 * np.random.default_rng(0).normal(size=12))
    room.write([f"{a},{20 * a},{loss}" for a, loss in zip(n, losses, strict=True)])
    text = " ".join(room.fit().split())
    assert "ill-conditioned: " in text and "N explains 100.0000% of the variance of D" in text
    error = room.fit("--budget", "1e25", "--json", code=2)
    assert "no optimum for 1e+25 FLOPs" in error and "N and D do not vary" in error
    (optimum,) = json.loads(room.printed)["optimal"]
    assert optimum["N"] is None and "N explains" in optimum["refused"]
    room.fit("--figure", str(room.folder / "ill.png"))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--budget=lots", "'lots' is not a number"),
        ("--budget=-1", "must be above 0"),
        ("--bootstraps=5", "from 20 to 1,000,000"),
        ("--level=90", "above 0 and below 1"),
        ("--where=family", "write COLUMN=VALUE"),
    ],
)
def test_wrong_options_are_explained(room: Room, option: str, says: str) -> None:
    assert says in room.fit(option, code=2)


def test_fitting_imports_no_torch() -> None:
    code = (
        "import sys, nlscale.cli.fit, nlscale.scaling.show.text, nlscale.scaling.show.figure, "
        "nlscale.scaling.show.families, nlscale.scaling.show.network, "
        "nlscale.scaling.show.text_network; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
