"""`nlscale bench coords`: under muP activations and their changes do not depend on the width."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import stand_at

from nlscale import cli
from nlscale.bench.coords import SMALL_MODEL, check_coordinates
from nlscale.config import recipe

STEPS = 4
FLAT = 0.15
"""Largest slope under muP, of any part, at any width; seen: 0.12. The standard parametrisation's
are 0.5 and more."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(*overrides: str, widths: tuple[int, ...], steps: int) -> dict[str, Any]:
    config = recipe.load(None, [*SMALL_MODEL, *overrides]).config
    return check_coordinates(config, list(widths), steps, lambda line: None)


@pytest.mark.parametrize(
    "kind",
    [
        ["model.mixer=hope"],
        ["model.mixer=hope", "model.cms=independent"],
        ["model.mixer=hope-pure"],
        ["model.mixer=gated-delta"],
        ["model.mixer=attention"],
    ],
    ids=lambda kind: "-".join(key.partition("=")[2] for key in kind),
)
def test_wider_models_act_and_change_alike_under_mup_and_only_there(kind: list[str]) -> None:
    result = check(*kind, widths=(64, 128, 256, 512), steps=STEPS)
    standard, mup = (result["parametrisations"][k]["parts"] for k in ("standard", "mup"))
    assert standard.keys() == mup.keys() and {"embedding", "logits", "read"} < mup.keys()
    for part, slopes in mup.items():
        assert abs(slopes["size_slope"][STEPS]) < FLAT, part
        for step in range(2, STEPS + 1):
            assert abs(slopes["change_slope"][step]) < FLAT, (part, step)
    # a token has its row of the embedding at any width
    for part in standard.keys() - {"embedding"}:
        assert standard[part]["change_slope"][STEPS] > 0.4, part
    for part in ("mixer output", "CMS level0", "CMS level1", "residual stream"):
        assert standard[part]["change_slope"][STEPS] > 1.0, part
    losses = {kind: found["losses"] for kind, found in result["parametrisations"].items()}
    assert all(after < before for before, after in zip(*losses["mup"][::STEPS], strict=True))


def test_at_the_base_width_both_are_the_same_model() -> None:
    result = check("model.mup_base_width=64", widths=(32, 64, 128), steps=2)
    standard, mup = (result["parametrisations"][k] for k in ("standard", "mup"))
    for part in mup["parts"]:
        for measure in ("size", "change"):
            for step in range(3):
                same = standard["parts"][part][measure][step][1]
                assert mup["parts"][part][measure][step][1] == same
    assert [row[1] for row in mup["losses"]] == [row[1] for row in standard["losses"]]
    assert [row[2] for row in mup["losses"]] != [row[2] for row in standard["losses"]]
    assert mup["losses"][0] == pytest.approx([math.log(32)] * 3, abs=0.1)


def test_sizes_are_those_of_the_start_and_nothing_has_changed_then() -> None:
    result = check("model.init_std=0.05", widths=(128, 64), steps=1)
    assert result["widths"] == [64, 128] and result["mup_base_width"] == 64
    parts = result["parametrisations"]["mup"]["parts"]
    assert parts["embedding"]["size"][0] == pytest.approx([0.05] * 2, rel=0.1)
    # RMS-normalised inputs: the standard deviation of the weights times the root of the width
    assert parts["query"]["size"][0] == pytest.approx([0.05 * 8] * 2, rel=0.1)
    assert all(p["change"][0] == [0, 0] and p["change_slope"][0] is None for p in parts.values())


def test_both_forms_of_cms_with_one_level_measure_the_same() -> None:
    one, other = (
        check("levels=[1]", f"model.cms={form}", widths=(32, 64), steps=1)["parametrisations"]
        for form in ("sequential", "independent")
    )
    for kind in ("standard", "mup"):
        for part in ("CMS level0", "residual stream", "logits"):
            expected = one[kind]["parts"][part]["size"][1]
            assert other[kind]["parts"][part]["size"][1] == pytest.approx(expected, rel=1e-4)


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "coords", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_it_prints_tables_json_and_a_figure_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # slow levels, several ranks and a warm-up do not stand in the way
    keys = [*SMALL_MODEL, "levels=[1,64]", "parallel.tensor=2", "optimizer.warmup_steps=100"]
    recipe.write(recipe.load(None, keys).config, tmp_path / "some.yaml")
    asked = [tmp_path / "some.yaml", "model.mixer=attention", "--widths", 32, 64, "--steps", 2]
    code, out, err = bench(capsys, *asked, "--json", "--figure", tmp_path / "figures" / "c.png")
    found = json.loads(out)
    assert code == 0 and found["widths"] == [32, 64] and found["mixer"] == "attention"
    assert (tmp_path / "figures" / "c.png").stat().st_size > 10_000
    assert "figures/c.png" in err and err.count("steps done") == 4
    moved = found["parametrisations"]["mup"]["parts"]["CMS level1"]["change"][1]
    assert all(change > 0 for change in moved)
    code, out, _ = bench(capsys, *asked)
    slope = found["parametrisations"]["standard"]["parts"]["query"]["change_slope"][2]
    (row, _) = (line for line in out.splitlines() if line.startswith("query"))
    assert code == 0 and row.endswith(f"{slope:+.2f}")
    assert max(map(len, out.splitlines())) <= 100


def test_a_model_that_diverges_is_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["optimizer.learning_rate=1e30", "--widths", 32, 64, "--steps", 2]
    code, out, _ = bench(capsys, *keys, "--figure", tmp_path / "c.svg")
    (row, _) = (line for line in out.splitlines() if line.startswith("logits"))
    assert code == 0 and row.split()[-1] == "-"
    assert "<svg" in (tmp_path / "c.svg").read_text()


def test_what_it_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in (
        (["--widths", 64], "two widths or more"),
        (["--widths", 64, 100], "100 is not a whole number of heads of 16"),
        (["--steps", 0], "--steps 0"),
        (["--figure", "c.xls"], "c.xls must end in .png"),
        (["model.vocabulary=null"], "model.vocabulary=256"),
        (["model.mup_base_width=40"], "use 32 or 48"),
        (["model.mup_base_width=0"], "must be above 0"),
    ):
        code, out, err = bench(capsys, *arguments)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    stand_at(monkeypatch, 0, 2)
    code, _, err = bench(capsys)
    assert code == 2 and "without torchrun" in err
