"""Figures drawn from metrics.jsonl alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.errors import UserError
from nlscale.telemetry import figures
from nlscale.telemetry.figures import draw_comparison, draw_loss, human_count, update_steps
from nlscale.telemetry.files import to_json
from nlscale.telemetry.run import Telemetry, WandbOptions

PNG = b"\x89PNG\r\n\x1a\n"


def records(steps: int, dropped: int | None = None) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        levels = {
            name: {"period": p, "updates": step // p, "updated": step % p == 0 and step != dropped}
            for name, p in {"base": 1, "slow": 4}.items()
        }
        loss = math.nan if step == dropped else 2 + 1 / step
        out.append(
            {
                "kind": "train",
                "step": step,
                "tokens": step * 1000,
                "loss": loss,
                "tokens_per_second": 1.0,
                "step_seconds": 1.0,
                "levels": levels,
            }
        )
        if step % 5 == 0:
            validation = {"kind": "validation", "step": step, "tokens": step * 1000}
            out.append(validation | {"loss": 2.0, "bits_per_byte": 2.5})
    return out


def run(run_dir: Path, more: str = "", dropped: int | None = None, **summary: float) -> Path:
    """What a run of 20 steps leaves for its figure."""
    run_dir.mkdir(exist_ok=True)
    lines = "".join(to_json(record) + "\n" for record in records(20, dropped))
    (run_dir / "metrics.jsonl").write_text(lines + more)
    (run_dir / "summary.json").write_text(to_json(summary))
    return run_dir


def evaluations(steps: Iterable[int]) -> str:
    """Lines of metrics.jsonl: an evaluation of two quantities, one of a score beside chance."""
    lines = []
    for step in steps:
        seen = {
            "kind": "evaluation",
            "step": step,
            "tokens": 1000 * step,
            "time": 0.5,
            "seconds": 2.0,
        }
        parts = {"0-8/loss": 2.0 + 1 / (step + 1), "8-32/loss": 1.5, "rank_of_all": float(step)}
        lines += [seen | {"name": "parts"} | parts]
        score = step / 20 if step else None
        lines += [seen | {"name": "task", "samples": 64, "accuracy": score, "chance": 0.25}]
    return "".join(json.dumps(line) + "\n" for line in lines)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def test_update_steps_follow_what_happened_not_the_period() -> None:
    assert update_steps(records(12, dropped=8)) == {
        "base": [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12],
        "slow": [4, 12],
    }
    assert update_steps(records(3))["slow"] == []
    assert update_steps([]) == {}


def test_finish_writes_summary_and_figure(tmp_path: Path) -> None:
    with Telemetry(tmp_path, 20, WandbOptions(), {}, 1000) as telemetry:
        for record in records(20):
            report = telemetry.train_step if record["kind"] == "train" else telemetry.validation
            report(record)
        telemetry.finish({"steps": 20, "loss": math.nan})
    assert is_png(tmp_path / "loss.png")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 20,
        "loss": None,
        "not_finite": ["loss"],
    }
    assert list(tmp_path.glob(".partial*")) == []


def test_the_figure_draws_each_level_at_its_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    run(tmp_path, dropped=8)
    monkeypatch.setattr(figures, "save_figure", lambda figure, out: saved.append(figure) or out)
    draw_loss(tmp_path)
    loss, strip = saved[0].axes[:2]
    assert [t.get_text() for t in strip.get_yticklabels()] == [
        "base  every step",
        "slow  every 4 steps",
    ]
    bars, ticks = strip.collections
    spans = [(p.vertices[:, 0].min(), p.vertices[:, 0].max()) for p in bars.get_paths()]
    assert spans == [(0.5, 7.5), (8.5, 20.5)]
    assert [segment[0][0] for segment in ticks.get_segments()] == [4, 12, 16, 20]
    assert "loss not finite" in [t.get_text() for t in loss.get_legend().get_texts()]
    assert saved[0].get_suptitle() == f"{tmp_path.name}: 2.500 bits per byte in validation"


def test_evaluations_stand_below_the_loss_a_quantity_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    run(tmp_path, evaluations(range(0, 21, 5)))
    monkeypatch.setattr(figures, "save_figure", lambda figure, out: saved.append(figure) or out)
    draw_loss(tmp_path)
    loss, *panels, levels = saved[0].axes
    titles = ["parts: loss", "parts: rank of all", "task: accuracy"]
    assert [axes.get_title("left") for axes in panels] == titles
    shown = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels]
    assert shown == [["0-8: 2.048", "8-32: 1.5"], ["last: 20"], ["last: 1", "chance: 0.25"]]
    assert panels[0].get_ylabel() == "nats per token"
    for axes in panels:
        assert axes.get_xlim() == loss.get_xlim() == levels.get_xlim()
    line, chance = panels[2].lines
    assert list(line.get_xdata()) == [5, 10, 15, 20], "null is no point"
    assert list(line.get_ydata()) == [0.25, 0.5, 0.75, 1.0] and set(chance.get_ydata()) == {0.25}
    lines, alone = panels[0].get_ylim(), panels[1].get_ylim()
    assert lines[1] < 3.0, "how lines differ later is not lost in how they begin"
    assert alone[0] < 0 and alone[1] > 20


def test_more_evaluations_than_can_be_read_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    one = {"kind": "evaluation", "step": 1, "name": "much"}
    many = {f"{i}/loss": 1.0 for i in range(10)} | {f"other{i}": 1.0 for i in range(10)}
    bare = {"kind": "train", "step": 1, "tokens": 10, "loss": 2.0}
    lines = (json.dumps(line) + "\n" for line in (bare, one | many))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    monkeypatch.setattr(figures, "save_figure", lambda figure, out: saved.append(figure) or out)
    draw_loss(tmp_path)
    _, *panels = saved[0].axes
    drawn = sum(len(axes.lines) for axes in panels)
    assert drawn == 15 and len(panels) == 8
    said = panels[-1].get_xlabel()
    assert said == "step\n5 more figures are in metrics.jsonl"


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({}, None),
        ({"unigram_bits_per_byte": 5.0}, 4.0),  # validation: 2.0 nats a token, 2.5 bits a byte
        ({"unigram_bits_per_byte": 5.0, "unigram_nats_per_token": 3.5}, 3.5),
    ],
)
def test_the_unigram_reference_is_in_nats_per_token(
    summary: dict[str, float], expected: float | None, tmp_path: Path
) -> None:
    run(tmp_path, **summary)
    validation = [r for r in figures.read_records(tmp_path) if r["kind"] == "validation"]
    assert figures._unigram_nats(tmp_path, validation) == expected
    assert figures._unigram_nats(tmp_path, []) == summary.get("unigram_nats_per_token")


def test_smoothing_neither_lags_nor_follows_a_spike() -> None:
    losses = np.linspace(4, 2, 401)
    losses[200] = 50
    centres, smooth = figures._smoothed(losses)
    assert list(centres) == list(range(401))
    assert np.abs(smooth - np.linspace(4, 2, 401)).max() < 0.03
    assert len(figures._smoothed(np.ones(50_000))[0]) <= 1000
    assert list(figures._smoothed(np.array([3.0]))[1]) == [3.0]


def test_runs_without_levels_or_validation_or_of_one_step_are_drawn(tmp_path: Path) -> None:
    bare = {"kind": "train", "step": 1, "tokens": 10, "loss": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(bare) + "\n")
    assert is_png(draw_loss(tmp_path))


def test_nothing_to_draw_is_a_clear_error_but_finish_only_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl"):
        draw_loss(tmp_path)
    with Telemetry(tmp_path, 1, WandbOptions(), {}, 1) as telemetry:
        telemetry.finish({})
    with pytest.raises(UserError, match="nothing to draw"):
        draw_loss(tmp_path)
    assert "warning: loss.png was not drawn" in capsys.readouterr().out
    assert (tmp_path / "summary.json").exists()


def test_comparison_names_final_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        "one": run(tmp_path / "a", evaluations([5, 10])),
        "two": run(tmp_path / "b", evaluations([10, 20])),
    }
    assert is_png(draw_comparison(runs, tmp_path / "figures" / "both.png"))
    saved: list[Any] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, out: saved.append(figure) or out)
    draw_comparison(runs, tmp_path / "x.png")
    axes = saved[0].axes[0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "one: 2.000 (2.500 bits per byte)",
        "two: 2.000 (2.500 bits per byte)",
    ]
    assert list(axes.lines[0].get_xdata()) == [5000, 10000, 15000, 20000]
    *parts, task = saved[0].axes[1:]
    assert [below.get_title("left").split(": ")[1] for below in parts] == [
        "0-8/loss", "8-32/loss", "rank of all"
    ]  # fmt: skip
    first, second, _ = task.lines
    assert list(first.get_xdata()) == [5000, 10000] and list(second.get_xdata()) == [10000, 20000]
    colours = [line.get_color() for line in axes.lines]
    assert [first.get_color(), second.get_color()] == colours
    assert [text.get_text() for text in task.get_legend().get_texts()] == ["chance: 0.25"]


def test_comparison_of_a_run_without_validation_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="'mine'"):
        draw_comparison({"mine": tmp_path}, tmp_path / "x.png")
    with pytest.raises(UserError, match="no runs"):
        draw_comparison({}, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (950, "950"),
        (21345, "21.3k"),
        (999_949, "1M"),
        (13_107_200, "13.1M"),
        (2.5e9, "2.5B"),
        (1e12, "1T"),
    ],
)
def test_human_count(count: float, text: str) -> None:
    assert human_count(count) == text
