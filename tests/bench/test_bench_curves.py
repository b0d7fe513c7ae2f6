"""The quickstart twice, at a size that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.bench import curves
from nlscale.bench.curves import compare, train_with_and_without_kernels
from nlscale.errors import TrainingFailed

STEPS = 6
TINY = [
    *("model.layers=1", "model.d_model=16", "model.heads=1", "data.sequence_length=32"),
    *("train.global_batch=2", "train.validation_sequences=2", "levels=[1,2]"),
    "optimizer.warmup_steps=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as environment:
        # as where the caller is one of several ranks
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            environment.setenv(name, value)
        return train_with_and_without_kernels(folder, STEPS, TINY)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [*folder.glob("*/metrics.jsonl"), *folder.glob("*/checkpoints/*/*")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_on_a_cpu_both_learn_the_same(folder: Path, found: dict[str, Any]) -> None:
    """Apart from rounding: derivatives by hand are what a CPU has for kernels."""
    assert found["steps"] == STEPS and found["ok"] and found["seconds"] > 0
    assert 0 < found["final_difference"] < 1e-3 and found["largest_difference"] < 1e-3
    assert min(found[name]["final_loss"] for name in ("kernels", "torch")) > 4
    for name, kernels in (("kernels", "true"), ("torch", "false")):
        assert found[name]["tokens_per_second"] > 0 and found[name]["step_seconds"] > 0
        written = (folder / name / "config.yaml").read_text()
        assert f"kernels: {kernels}" in written and "dtype: bf16" in written


def test_what_is_there_is_not_done_again(
    folder: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    before, save = contents(folder), curves.save_figure
    monkeypatch.setattr(
        curves, "save_figure", lambda figure, out: drawn.append(figure) or save(figure, out)
    )
    again = train_with_and_without_kernels(folder, STEPS, TINY)
    assert len(before) > 4 and contents(folder) == before
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert Path(again["figure"]).read_bytes().startswith(b"\x89PNG")
    axes, _ = drawn[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    ends = [f"{found[name]['final_loss']:.3f} at the end" for name in ("kernels", "torch")]
    assert labels == [f"with kernels: {ends[0]}", f"in torch alone: {ends[1]}"]
    lines = [line for line in axes.lines if line.get_label() in labels]
    assert all(len(line.get_ydata()) == STEPS for line in lines)


def test_a_run_that_fails_says_why(folder: Path, found: dict[str, Any]) -> None:
    with pytest.raises(TrainingFailed, match=r"nlscale train.*model\.layers.*kernels\.log"):
        train_with_and_without_kernels(folder, STEPS, [*TINY, "model.layers=2"])


def test_differences_are_relative_and_the_last_twentieth_decides() -> None:
    torch = np.full(100, 2.0)
    kernels = torch.copy()
    kernels[10] = 3.0
    result = compare(kernels, torch)
    assert result["ok"] and result["final_difference"] == 0
    assert result["largest_difference"] == pytest.approx(0.5)
    assert result["mean_difference"] == pytest.approx(0.005)
    kernels[-5:] *= 1 + 2 * result["bound"]
    result = compare(kernels, torch)
    assert not result["ok"]
    assert result["final_difference"] == pytest.approx(2 * result["bound"])
    kernels[-1] = np.nan
    assert not compare(kernels, torch)["ok"]
