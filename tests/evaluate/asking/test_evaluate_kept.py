"""What makes a question another one: of what is kept, and of the keys of wandb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from asked import nlscale
from checkpoint.stores import flip
from generate.models import saved

from nlscale.config import recipe
from nlscale.data.build import build
from nlscale.data.tasks.build import build_task
from nlscale.evaluate.asking.kept import Named, named, stem
from nlscale.evaluate.asking.tracked import track
from nlscale.evaluate.position import measure
from nlscale.evaluate.trained import TRAINED

ASK = ["--lengths", "8,32", "--contexts", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files, and in it a data folder made of them."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        words = np.random.default_rng(number).choice(["some", "words", "of", "text\n"], 60)
        (folder / f"{number}.txt").write_text(" ".join(words))
    build([str(folder)], "bytes", folder / "data", held_out=0.5)
    return folder


def of_text(data: Path, text: Path) -> None:
    """Other text of the same size."""
    shutil.rmtree(data)
    for path in text.glob("*.txt"):
        path.write_text(path.read_text().replace("some", "none"))
    build([str(text)], "bytes", data, held_out=0.5)


def of_tokenizer(data: Path, text: Path) -> None:
    (data / "tokenizer.json").write_text('{"nlscale": "other"}')


def of_settings(data: Path, text: Path) -> None:
    (data / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def of_haystack(data: Path, text: Path) -> None:
    (text / "0.txt").write_text("hay " * 100)


@pytest.mark.parametrize("change", [of_text, of_tokenizer, of_settings, of_haystack])
def test_other_text_or_another_tokenizer_is_another_question(
    change: Callable[[Path, Path], None], text: Path, tmp_path: Path
) -> None:
    """Of the model's own data, of its task's haystack, and of a data folder that is named."""
    shutil.copytree(text, tmp_path / "text")
    hay = data = tmp_path / "text" / "data"
    if change is of_haystack:
        data = tmp_path / "data"
        hay = tmp_path / "text" / "0.txt"
        build_task(f"task:text-needle(length=64,kinds=s2,haystack={hay})", data, examples=4)
    model = Named(6, "its weights", data)

    def stems() -> set[str]:
        others = Named(6, "its weights", None)
        return {stem("loss", model, {}), stem("loss", others, {"data": hay})}

    before = stems()
    assert before == stems() and len(before) == 2
    change(data, tmp_path / "text")
    assert not before & stems()


def test_a_tokenizer_that_is_named_stands_for_what_it_is(text: Path, tmp_path: Path) -> None:
    def asked(folder: Path) -> str:
        return stem("loss", Named(6, "", None), {"tokenizer": folder / "tokenizer.json"})

    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(text / "data" / "tokenizer.json", tmp_path / name)
    (tmp_path / "other" / "weights").write_text("which are nobody's business")
    before = asked(tmp_path / "one")
    assert asked(tmp_path / "other") == before
    of_settings(tmp_path / "other", text)
    assert asked(tmp_path / "other") != before


def test_what_an_older_checkpoint_answered_is_found_when_the_newest_is_broken(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"data.dir={text / 'data'}", "model.mixer=gated-delta", "model.vocabulary=256"]
    older = saved(tmp_path, *keys)
    command = ["eval", "loss", str(tmp_path), *ASK, "--cache", str(tmp_path / "kept"), "--json"]
    assert nlscale(*command) == 0
    answer = capsys.readouterr().out
    newest = saved(tmp_path, *keys, step=8)
    assert named(tmp_path).step == 8
    flip(newest.path / "__0_0.distcp", 100)
    monkeypatch.setattr(measure, "evaluate", lambda *_: pytest.fail("it is asked again"))
    with pytest.warns(UserWarning, match="checkpoint of step 8 is broken, trying step 6"):
        assert nlscale(*command) == 0
    assert capsys.readouterr().out == answer
    # set aside while another of its step was to take its place, which never came
    shutil.rmtree(newest.path)
    whole = named(tmp_path)
    older.path.rename(older.path.with_suffix(".replaced"))
    assert named(tmp_path) == whole


def test_options_that_change_the_speed_alone_are_options() -> None:
    import argparse

    for one in TRAINED.values():
        parser = argparse.ArgumentParser()
        one.add_arguments(parser)
        assert {*one.speed} <= {action.dest for action in parser._actions}


def test_keys_of_wandb_tell_questions_apart_and_are_the_same_in_every_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    summary: dict[str, Any] = {}
    run = SimpleNamespace(
        summary=summary, url="", define_metric=lambda *_, **__: None, finish=lambda **_: None
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    config = recipe.load(None, [f"data.dir={text}", "wandb.enabled=true"]).config

    def keys(folder: str, **asked: Any) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        recipe.write(config, tmp_path / folder / "config.yaml")
        summary.clear()
        track(tmp_path / folder, "loss", asked, {"0-256/loss": 1.0}, print)
        return list(summary)

    defaults = {"contexts": 16, "lengths": [256, 1024, 4096], "text": None}
    assert keys("a", **defaults) == keys("b", **defaults) == ["eval/loss/0-256/loss"]
    shutil.copy(text / "1.txt", tmp_path / "same.txt")
    one = keys("a", **{**defaults, "text": text / "1.txt"})
    assert one == keys("b", **{**defaults, "text": tmp_path / "same.txt"})
    assert summary[one[1]] == f"text={tmp_path / 'same.txt'}"
    asked: list[dict[str, Any]]
    asked = [{}, {"text": text / "1.txt"}, {"text": text / "2.txt"}, {"lengths": [256]},
             {"contexts": 4}]  # fmt: skip
    assert len({keys("a", **{**defaults, **more})[0] for more in asked}) == len(asked)


@pytest.mark.parametrize(("later", "data"), [("a", Path("a")), ("b", None)])
def test_of_several_folders_none_is_the_data(tmp_path: Path, later: str, data: Any) -> None:
    """As `data_of` has it, which asks for one to be named."""
    stages = [{"from": "50%", "sequence_length": None, "mixture": [{"dir": later}]}]
    described = {"nlscale": {"data": {"dir": "a", "mixture": [], "stages": stages}}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert named(tmp_path).data == data
