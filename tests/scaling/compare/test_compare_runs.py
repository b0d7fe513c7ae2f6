"""`nlscale compare` over folders of runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scaling.run_folders import finished_run

from nlscale import cli
from nlscale.errors import UserError
from nlscale.scaling.compare.answer import Answer, answer
from nlscale.scaling.compare.finalists import Finalists
from nlscale.scaling.compare.question import Question
from nlscale.scaling.compare.runs import Measured, find_runs

LOSSES = {
    "attention": {1: 2.00, 2: 2.10, 3: 1.95},
    "hope": {1: 1.90, 2: 2.01, 3: 1.84},
    "gated-delta": {1: 1.99, 2: 2.12, 3: 1.95},
}


def run_folder(
    folder: Path, mixer: str, seed: int, loss: float, *more: str, steps: int = 20
) -> None:
    """With three validations after the first step, whose mean is the loss."""
    keys = (f"model.mixer={mixer}", f"run.seed={seed}", *more)
    summary = finished_run(folder, steps, loss + 0.3, *keys, tokens_per_second=4096.0)
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": steps}))
    records = [{"kind": "validation", "step": 0, "loss": 9.0}]
    records += [
        {"kind": "validation", "step": i, "loss": loss + d}
        for i, d in ((1, -0.2), (2, 0.1), (3, 0.1))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for mixer, losses in LOSSES.items():
        for seed, loss in losses.items():
            run_folder(tmp_path / "runs" / f"{mixer}-{seed}", mixer, seed, loss)
    return tmp_path / "runs"


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def plain(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = compare(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_pairs_of_one_seed_decide_what_seeds_alone_hide(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plain(capsys, runs, "--by", "model.mixer", "--baseline", "model.mixer=attention")
    assert found["pairs"] == [["1"], ["2"], ["3"]] and found["metric"] == "val_loss"
    hope, gated = (
        next(c for c in found["contrasts"] if c["value"] == value)
        for value in ("hope", "gated-delta")
    )
    assert hope["differences"] == pytest.approx([-0.10, -0.09, -0.11])
    assert hope["verdict"] == "lower" and hope["interval"][1] < 0
    assert gated["verdict"] == "undecided" and gated["interval"][0] < 0 < gated["interval"][1]
    cell = next(c for c in found["cells"] if c["factors"] == {"model.mixer": "hope"})
    assert cell["mean"] == pytest.approx(sum(LOSSES["hope"].values()) / 3)
    heads, d = 2, 32  # in each of 4 layers S and twice Pi, in fp32, and 3 tokens that feed them
    assert cell["state_bytes"] == 4 * (4 * heads * 3 * d * d + 2 * 3 * 2 * heads * d)
    assert cell["seconds_per_step"] == 2.0  # 8,192 tokens, at 4,096 a second
    last = plain(capsys, runs, "--by", "model.mixer", "--metric", "final_val_loss")
    assert last["cells"][0]["mean"] == pytest.approx(cell["mean"] + 0.3, abs=0.2)


def test_the_table_says_it_in_words_and_draws_it(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "mixers.png"
    code, out, _ = compare(
        capsys, runs, "--by", "model.mixer", "--baseline", "model.mixer=attention",
        "--effect", 0.005, "--figure", figure,
    )  # fmt: skip
    assert code == 0 and figure.read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    (head,) = (line for line in lines if "parameters" in line and "s/step" in line)
    (row,) = (line for line in lines if line.startswith("hope  "))
    assert head.split()[-2:] == ["s/step", "state"] and row.split()[-3] == "2"
    (hope,) = (line for line in lines if line.startswith("hope - attention"))
    (gated,) = (line for line in lines if line.startswith("gated-delta - attention"))
    assert "-0.1000 [" in hope and ", lower; 3 pairs show" in hope
    assert ", undecided; 3 pairs show" in gated and "0.005 would take" in gated


def test_what_was_asked_of_the_runs_is_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--by", "model.mixer", "--metric", "eval.automata.2x/targets")
    for mixer, losses in LOSSES.items():
        for seed in losses:
            folder = runs / f"{mixer}-{seed}" / "evals"
            folder.mkdir()
            share = {"hope": 0.5, "attention": 0.2}.get(mixer, 0.3) + 0.01 * seed
            result = {"figures": {"1x/targets": 1.0, "2x/targets": share}}
            (folder / "automata-step20-ab.json").write_text(json.dumps({"result": result}))
            other = {"figures": {"2x/targets": 0.9}}
            (folder / "recall-step20-cd.json").write_text(json.dumps({"result": other}))
    found = plain(capsys, runs, *asked, "--baseline", "model.mixer=attention")
    hope = next(c for c in found["contrasts"] if c["value"] == "hope")
    assert hope["differences"] == pytest.approx([0.3] * 3) and hope["verdict"] == "higher"
    again = runs / "hope-2" / "evals" / "automata-step20-ef.json"
    again.write_text((runs / "hope-2" / "evals" / "automata-step20-ab.json").read_text())
    (runs / "hope-3" / "evals" / "automata-step20-ab.json").unlink()
    _, out, err = compare(capsys, runs, *asked)
    said = " ".join((out + err).split())
    assert "hope-2 has several eval.automata.2x/targets" in said
    assert "ask with: nlscale eval automata" in said


def test_a_factor_beside_others_is_averaged_over_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mixer, base in (("attention", 2.0), ("hope", 1.9)):
        for layers, more in ((4, 0.0), (8, -0.5)):
            for seed, noise in ((1, 0.0), (2, 0.07), (3, 0.02)):
                name = f"{mixer}-{layers}-{seed}"
                loss = base + more + noise
                run_folder(tmp_path / name, mixer, seed, loss, f"model.layers={layers}")
    found = plain(capsys, tmp_path, "--by", "model.mixer", "--by", "model.layers")
    contrasts = {c["factor"]: c for c in found["contrasts"]}
    assert contrasts["model.mixer"]["mean"] == pytest.approx(-0.1)
    assert contrasts["model.mixer"]["over"] == "model.layers"
    assert contrasts["model.layers"]["mean"] == pytest.approx(-0.5)
    assert found["contrasts"][0]["interval_level"] == pytest.approx(0.975)
    assert any("parameters are not equal" in line for line in found["unequal"])
    found = plain(capsys, tmp_path, "--by", "model.mixer", "--where", "model.layers=8")
    assert len(found["contrasts"]) == 1 and not found["unequal"]


def test_what_else_differs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mixer, rate in (("attention", 0.001), ("hope", 0.002)):
        for seed in (1, 2):
            rated = f"optimizer.learning_rate={rate}"
            run_folder(tmp_path / f"{mixer}-{seed}", mixer, seed, 2.0 + seed, rated)
    code, out, _ = compare(capsys, tmp_path, "--by", "model.mixer")
    assert code == 0
    line = "differs as well: optimizer.learning_rate: attention 0.001, hope 0.002"
    assert line in out.splitlines()


def test_a_long_value_is_named_by_a_letter_so_that_its_numbers_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = '{mixer: "hope", memory: {write: "decayed", strength: 2, query_convolution: true}}'
    for seed in (1, 2):
        run_folder(tmp_path / f"hope{seed}", "hope", seed, 2.0, "model.pattern=[hope]")
        run_folder(
            tmp_path / f"more{seed}", "hope", seed, 1.5 + seed / 8, f"model.pattern=[{more}]"
        )
    code, out, err = compare(
        capsys, tmp_path, "--by", "model.pattern", "--baseline", "model.pattern=[hope]"
    )
    assert code == 0, err
    lines = out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("A  "))
    assert row[:4] == ["A", "1.6250", "1.7500", "1.6875"]
    (legend,) = (line for line in lines if line.startswith("A: [{"))
    assert '"decayed"' in legend and "query_convolution: true" in legend
    assert any(line.startswith("A - [hope]: -0.3125") for line in lines)


def test_of_many_pairs_the_table_has_the_lowest_and_the_highest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mixer in ("attention", "hope"):
        for seed in range(1, 10):
            run_folder(tmp_path / f"{mixer}-{seed}", mixer, seed, 2.0 + seed / 8)
    code, out, err = compare(capsys, tmp_path, "--by", "model.mixer")
    assert code == 0 and "of 9 pairs" in out, err
    head, row = (line for line in out.splitlines() if line.startswith(("model.mixer", "hope  ")))
    assert head.split()[:4] == ["model.mixer", "lowest", "highest", "mean"]
    assert row.split()[:4] == ["hope", "2.1250", "3.1250", "2.6250"]


def test_a_pattern_is_the_same_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = '{strength: 2, write: "decayed"}'
    for seed in (1, 2):
        run_folder(tmp_path / f"hope{seed}", "hope", seed, 2.0, "model.pattern=[hope]")
        run_folder(
            tmp_path / f"more{seed}",
            "hope",
            seed,
            1.9,
            f"model.pattern=[{{mixer: hope, memory: {memory}}}]",
        )
    other = "model.pattern=[{memory: {write: decayed, strength: 2.0}, mixer: hope}]"
    code, out, err = compare(capsys, tmp_path, "--by", "model.pattern", "--baseline", other)
    assert code == 0 and "[hope] - A: +0.1000" in out, err
    for wrong in ("model.pattern=[{mixer: hope}]", "model.pattern=[{"):
        code, _, err = compare(capsys, tmp_path, "--by", "model.pattern", "--baseline", wrong)
        assert code == 2 and "no run has it" in err


def test_a_key_of_a_level_is_compared_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (static, local) in {1: (2.0, 1.8), 2: (2.1, 1.91), 3: (1.9, 1.69)}.items():
        run_folder(tmp_path / f"static{seed}", "hope", seed, static, "levels=[1,4,16]")
        context = (
            "levels=[1,4,16]",
            "levels.spectrum.0.context.chunk=64",
            "levels.spectrum.0.hidden=48",
        )
        run_folder(tmp_path / f"local{seed}", "hope", seed, local, *context)
    code, out, err = compare(capsys, tmp_path, "--by", "levels.spectrum.0.context.chunk")
    assert code == 0, err
    assert "null - 64: +0.2" in out and "differs as well: levels.spectrum.0.hidden: 64 48" in out
    assert "levels.spectrum:" not in out


def test_runs_left_out_for_one_reason_are_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in runs.glob("hope-*"):
        (folder / "metrics.jsonl").write_text("")
    code, _, err = compare(capsys, runs, "--by", "model.mixer")
    assert code == 0
    assert "left out, as 2 others: " in err and "hope-1 has no validation after" in err
    assert "hope-2" not in err and err.count("\n") == 1


def test_runs_that_make_no_pair_are_left_out_and_named(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "hope-2" / "summary.json").unlink()
    code, out, err = compare(capsys, runs, "--by", "model.mixer")
    assert code == 0 and "val_loss of 2 pairs by run.seed" in out
    assert "hope-2 is left out: it has not finished" in err
    assert "attention-2 is left out: another cell has no run with run.seed=2" in out


def test_one_run_that_diverged_costs_its_pair_alone(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (runs / "hope-2" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "validation", "step": 4, "loss": None}) + "\n")
    code, out, err = compare(capsys, runs, "--by", "model.mixer")
    assert code == 0 and "2 pairs by run.seed" in out
    assert "hope-2 has diverged" in err and "attention-2 is left out" in out


def test_values_are_those_of_recipes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--by", "model.mixer", "--where", "optimizer.learning_rate=3e-4")
    rate = plain(capsys, runs, "--by", "model.mixer", "--where", "model.mup_base_width=null")
    assert len(rate["cells"]) == 3
    code, _, err = compare(capsys, runs, *asked)
    assert code in (0, 2) and "Traceback" not in err


def test_the_runs_of_a_search_are_no_evidence(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mixer in LOSSES:
        run_folder(runs / "search" / mixer, mixer, 1, 1.0, "run.purpose=search")
    code, out, err = compare(capsys, runs, "--by", "model.mixer")
    assert code == 2 and "has seed 1, by which the search beside it has chosen" in err
    for mixer in LOSSES:
        shutil.rmtree(runs / f"{mixer}-1")
    code, out, err = compare(capsys, runs, "--by", "model.mixer")
    assert code == 0 and err.count("part of a search") == 1
    assert "3 runs are left out: they were part of a search" in err
    assert "2 pairs" in out and "1.0000" not in out
    code, _, err = compare(capsys, runs / "search", "--by", "model.mixer")
    assert code == 2 and "of a search" in err


PLACES = {("hope", "0.004"): 1, ("hope", "0.002"): 2, ("attention", "0.002"): 1}
PLACES |= {("attention", "0.004"): 2}


@pytest.fixture
def finalists(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Asks two finalists of two mixers; on their own seeds the second of attention is best."""
    losses = {("hope", 1): 1.0, ("hope", 2): 1.2, ("attention", 1): 1.1, ("attention", 2): 0.9}
    rate, runs = "optimizer.learning_rate", []
    for (mixer, value), place in PLACES.items():
        for seed, noise in ((1, 0.0), (2, 0.1), (3, 0.05)):
            keys = {"model.mixer": mixer, rate: value, "run.seed": str(seed)}
            keys["finalist"] = str(place)
            loss, folder = losses[mixer, place] + noise, Path(f"{mixer}-{seed}-{place}")
            runs.append(Measured(folder, keys, keys, loss, 1e5, 1e6, False, rate))
    monkeypatch.setattr("nlscale.scaling.compare.answer.find_runs", lambda *_: (runs, []))
    return lambda **more: answer([], Question(**{"by": ["model.mixer"], **more}))


def test_finalists_are_compared_place_by_place(finalists: Callable[..., Answer]) -> None:
    tables = finalists(each=["finalist"]).tables
    assert list(tables) == ["finalist 1", "finalist 2"]
    means = [table.contrasts[0].paired.mean for table in tables.values()]
    assert means == pytest.approx([0.1, -0.3])
    levels = [table.contrasts[0].paired.level for table in tables.values()]
    assert levels == pytest.approx([0.975, 0.975]), "both count"
    first = finalists(only={"finalist": "1"}).tables[""]
    assert first.contrasts[0].paired.mean == pytest.approx(0.1)
    rate = "optimizer.learning_rate"
    assert len(finalists(by=["model.mixer", rate]).tables[""].contrasts) == 2, "all are shown"
    assert len(finalists(each=[rate]).tables) == 2


def test_no_finalist_is_chosen_on_the_seeds_of_the_claim(
    finalists: Callable[..., Answer],
) -> None:
    with pytest.raises(UserError, match="these seeds may not decide: --where finalist=1 takes"):
        finalists()
    with pytest.raises(UserError, match="may pick the luckiest"):
        finalists(only={"optimizer.learning_rate": "0.004"})


def test_a_sweep_keeps_the_places_that_its_search_gave(tmp_path: Path) -> None:
    run_folder(tmp_path / "one", "hope", 1, 2.0)
    (tmp_path / "search").mkdir()
    Finalists("optimizer.learning_rate", {"one": 2}).write(tmp_path)
    ((run,), _) = find_runs([tmp_path], "val_loss")
    assert (run.keys["finalist"], run.searched_key) == ("2", "optimizer.learning_rate")
    (tmp_path / "search" / "finalists.json").write_text('{"key": "x", "places": {"one": "b"}}')
    with pytest.raises(UserError, match=r"finalists\.json is damaged; move it away"):
        find_runs([tmp_path], "val_loss")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--by", "model.mixr"], "did you mean 'model.mixer'"),
        (["--by", "model.layers"], "every run has 4"),
        (["--by", "model.mixer", "--metric", "accuracy"], "has no number accuracy; there are"),
        (["--by", "model.mixer", "--baseline", "model.mixer=mamba"], "no run has it; there are"),
        (["--by", "model.mixer", "--baseline", "attention"], "KEY=VALUE"),
        (["--by", "model.mixer", "--where", "run.seed=9"], "there are"),
        (["--by", "run.seed", "--paired-by", "model.layers"], "they differ in model.mixer"),
        (["--by", "model.mixer", "--figure", "f.bmp"], ".png"),
        (["--by", "model.mixer", "--level", "1"], "--level"),
        (["--by", "model.mixer", "--each", "finalist"], "none of these runs is a finalist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_asked_wrongly_is_said_in_one_line(
    asked: list[str], says: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = compare(capsys, runs, *asked)
    assert code == 2 and not out
    assert says in err and err.count("\n") == 1, err
