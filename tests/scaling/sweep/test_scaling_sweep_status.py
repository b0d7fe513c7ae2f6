"""Where a run of a sweep stands, read from a folder in which anything may lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaling.run_folders import VOCABULARY, finished_run

from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.status import last_step, status
from nlscale.train.folder import read

DAMAGED = ["", "{}", "[]", "\0", '{"final_val_loss": "low"}', '{"tokens": 8}']


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One that has finished."""
    folder = tmp_path / "run"
    finished_run(folder, steps=10, loss=2.5)
    return Run("run", {}, read(folder).config, VOCABULARY, 1, 1, 1.0)


def test_a_whole_summary_is_that_of_a_finished_run(run: Run) -> None:
    assert status(run).finished and status(run).step == 10


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_summary_is_named_or_made_again_from_checkpoints(run: Run, content: str) -> None:
    (run.folder / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json is damaged: [^\n]* move [^\n]*$"):
        status(run)
    (run.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 6}\nnot json\n[]\n{"st')
    assert not status(run).finished and status(run).step == last_step(run) == 6


@pytest.mark.parametrize("content", ["", "{}", "model: [", "\0"])
def test_a_damaged_configuration_is_named(run: Run, content: str) -> None:
    (run.folder / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml cannot be read as that of run: [^\n]*$"):
        status(run)
    (run.folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"holds a run without its config\.yaml; move"):
        status(run)
