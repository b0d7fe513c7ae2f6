"""Mistakes that an evaluation must not hide, and folders that it must not touch."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asked import alone, nlscale
from generate.models import saved

from nlscale.checkpoint.store.store import Checkpoint
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.evaluate.asking import session
from nlscale.evaluate.asking.kept import home_of
from nlscale.evaluate.finite import finite
from nlscale.evaluate.instruments.options import factors
from nlscale.generate.model import Model

ASK = ["--lengths", "8,32", "--contexts", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        words = np.random.default_rng(number).choice(["some", "words", "of", "text\n"], 60)
        (folder / f"{number}.txt").write_text(" ".join(words))
    build([str(folder)], "bytes", folder / "data", held_out=0.5)
    run = tmp_path_factory.mktemp("run")
    keys = [f"data.dir={folder / 'data'}", "model.mixer=gated-delta", "model.vocabulary=256"]
    checkpoint = saved(run, *keys)
    (run / "config.yaml").touch()
    return run, checkpoint


def test_a_checkpoint_is_as_it_was_after_it_was_asked(
    trained: tuple[Path, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, checkpoint = trained
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    monkeypatch.chdir(checkpoint.path)
    assert home_of(Path()) == run / "evals"
    monkeypatch.chdir(checkpoint.path.parent)
    assert nlscale("eval", "loss", checkpoint.path.name, *ASK) == 0
    assert nlscale("eval", "loss", str(copy), *ASK) == 0
    checkpoint.verify()
    Checkpoint(copy, checkpoint.step).verify()
    assert len(list((run / "evals").iterdir())) == 1
    assert len(list((tmp_path / "copy.evals").iterdir())) == 1


@pytest.mark.parametrize("name", ["loss", "needle"])
def test_a_model_that_has_diverged_has_no_score(
    name: str,
    trained: tuple[Path, Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reads = Model.stream

    def diverged(self: Model, batch: int = 1) -> Any:
        stream = reads(self, batch)
        feed = stream.feed
        stream.feed = lambda *a, **k: feed(*a, **k) * torch.nan  # type: ignore[method-assign]
        return stream

    monkeypatch.setattr(Model, "stream", diverged)
    more = ASK if name == "loss" else ["--kinds", "s1", "--form", "short", "--lengths", "128"]
    command = ["eval", name, str(trained[0]), *more, "--cache", str(tmp_path / "evals")]
    assert nlscale(*command) == 2
    assert "logits that are not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "evals").glob("*.json"))


def test_finite() -> None:
    assert finite(torch.zeros(2)).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="not finite"):
        finite(torch.tensor([0.0, torch.inf]))


def test_ranks_that_read_other_steps_are_refused(
    trained: tuple[Path, Checkpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks = alone("loss").ranks
    monkeypatch.setattr(ranks, "gather", lambda step: [step, step + 2])
    options = argparse.Namespace(lengths=[8], contexts=1, data=None, text=None, tokenizer=None)
    options.context = options.learned = None
    with pytest.raises(UserError, match=r"at steps 6, 8: it is being trained"):
        session.ask_all("loss", [trained[0]], options, ranks, tmp_path)


@pytest.mark.parametrize("text", ["512", "1,2x", "0x"])
def test_lengths_of_tasks_are_factors(text: str) -> None:
    assert factors("1x,2x") == [1, 2]
    with pytest.raises(argparse.ArgumentTypeError):
        factors(text)
