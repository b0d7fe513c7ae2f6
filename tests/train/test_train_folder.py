"""What a run's folder says when Python asks: metrics as a table, summary, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest

import nlscale
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.train.folder import Run

TRAIN = {"kind": "train", "tokens": 64, "time": 1.5, "loss": 2.0}


def level(norm: float | None) -> dict[str, Any]:
    return {"updates": 1, "updated": norm is not None, "grad_norm": norm, "update_ratio": None}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Under way: two steps and a validation, and a third step that is being written."""
    overrides = ["data.dir=none", "levels=[1,4]", f"run.dir={tmp_path}", "run.imports=[nothing]"]
    recipe.write(recipe.load(None, overrides).config, tmp_path / "config.yaml")
    records = [
        {"kind": "validation", "step": 0, "loss": 5, "bits_per_byte": 7.2},
        {**TRAIN, "step": 1, "levels": {"fast": level(0.5), "slow": level(None)}},
        {**TRAIN, "step": 2, "levels": {"fast": level(2), "slow": level(None)}, "loss": None,
         "not_finite": ["loss"], "ranks": {"slowest": 0.3, "slowest_host": "n1"}},
    ]  # fmt: skip
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 3, "lo')
    return nlscale.read(str(tmp_path))


def test_nested_fields_are_columns_with_dotted_names(run: Run) -> None:
    table = run.metrics()
    assert table.num_rows == 2
    assert table.column_names == [
        "tokens", "time", "loss", "step",
        "levels.fast.updates", "levels.fast.updated", "levels.fast.grad_norm",
        "levels.fast.update_ratio",
        "levels.slow.updates", "levels.slow.updated", "levels.slow.grad_norm",
        "levels.slow.update_ratio",
        "not_finite", "ranks.slowest", "ranks.slowest_host",
    ]  # fmt: skip
    columns = table.to_pydict()
    assert columns["step"] == [1, 2] and columns["loss"] == [2.0, None]
    assert columns["levels.fast.grad_norm"] == [0.5, 2.0]
    assert columns["ranks.slowest_host"] == [None, "n1"]
    assert columns["not_finite"] == [None, ["loss"]]
    # a level that has not updated yet has numbers all the same, to be added up or drawn
    assert table.schema.field("levels.slow.grad_norm").type == pyarrow.float64()
    assert table.schema.field("levels.slow.updated").type == pyarrow.bool_()
    assert run.metrics("validation").to_pydict() == {
        "step": [0], "loss": [5], "bits_per_byte": [7.2],
    }  # fmt: skip


def test_a_kind_without_records_names_those_that_there_are(run: Run) -> None:
    with pytest.raises(UserError, match="no records of kind 'evaluation'; it has validation, tra"):
        run.metrics("evaluation")
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="it has none yet"):
        run.metrics()
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl"):
        run.metrics()


def test_a_figure_that_is_text_and_number_is_named(run: Run) -> None:
    lines = [{"kind": "evaluation", "step": i, "score": s} for i, s in enumerate([0.5, "high"])]
    (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: score is not of one type"):
        run.metrics("evaluation")


def test_a_run_under_way_has_a_configuration_and_no_summary(run: Run) -> None:
    assert not run.finished and run.summary is None and run.checkpoints == []
    assert [level.period for level in run.config.levels.spectrum] == ["1", "4"]
    for name in ("step-00000020", "step-00000003", "step-00000040.partial"):
        (run.folder / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in run.checkpoints] == ["step-00000003", "step-00000020"]
    (run.folder / "summary.json").write_text('{"final_val_loss": 2.5, "steps": 2}')
    assert run.finished and run.summary == {"final_val_loss": 2.5, "steps": 2}


def test_metrics_can_be_read_where_the_mixer_is_unknown(run: Run) -> None:
    path = run.folder / "config.yaml"
    path.write_text(path.read_text().replace("mixer: hope", "mixer: retention"))
    again = nlscale.read(run.folder)
    assert again.metrics().num_rows == 2
    with pytest.raises(UserError, match="'retention' is not one of"):
        _ = again.config


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run in .*runs/x: it has no config\.yaml"):
        nlscale.read(tmp_path / "runs" / "x")


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"steps": "many"}', '{"x": 1}'])
def test_a_damaged_summary_is_one_line_and_no_end(run: Run, content: str) -> None:
    (run.folder / "summary.json").write_text(content)
    assert not run.finished
    with pytest.raises(UserError, match=r"^\S*summary\.json is damaged: [^\n]*$"):
        _ = run.summary
