"""Scores on a task: of a run that has ended, and while one trains, on any layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import world
from generate.models import saved
from torch import Tensor

from nlscale import cli
from nlscale.config import recipe, shipped
from nlscale.data import Samples, TokenShards
from nlscale.data.tasks.build import build_task
from nlscale.data.tasks.table import task_of
from nlscale.data.tasks.task import Task
from nlscale.errors import UserError
from nlscale.evaluate.tasks import Share, score
from nlscale.generate.model import Model

TASK = "aa(longest=8, length=32)"
KEYS = [
    "data.sequence_length=32", "model.layers=2", "model.d_model=32", "model.heads=2",
    "model.vocabulary=8", "model.memory.chunk=8", "model.init_std=0.3", "train.dtype=fp32",
    "train.micro_batch=2", "train.global_batch=8", "train.validation_sequences=11",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task")
    build_task(f"task:{TASK}", out, examples=60, held_out=0.3)
    return out


def found(data: Path, keys: list[str], counts_alone: bool) -> tuple[dict[str, float | None], float]:
    """What `evaluate: [task]` says on this rank; and a count by hand, where that is one rank."""
    from nlscale.evaluate.accuracy import accuracy
    from nlscale.levels.spectrum import spectrum
    from nlscale.parallel.layout import process_groups
    from nlscale.step.trainer import Trainer

    config = recipe.load(None, [f"data.dir={data}", *KEYS, *keys]).config
    samples, right, of = Samples(TokenShards(data, "validation"), 32), 0, 0
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 1), 8)
        said = accuracy(trainer, samples)
        for number in range(11 if counts_alone else 0):
            (stage,), row = trainer.stages, torch.from_numpy(samples[number])[None]
            with torch.no_grad():
                logits = stage.logits(stage.hidden(row[:, :-1])[0])[:, 0]
            mask = samples.mask(number)
            assert mask is not None
            right += int((logits.argmax(-1) == row[0, 1:])[torch.from_numpy(mask[1:])].sum())
            of += int(mask[1:].sum())
    return said, right / max(1, of)


@pytest.fixture(scope="module")
def alone(data: Path) -> dict[str, float | None]:
    ((said, counted),) = world.run(1, found, data, [], True)
    assert said == {"accuracy": pytest.approx(counted), "chance": 0.5}
    assert 0 < counted < 1, "a test of nothing otherwise"
    return said


@pytest.mark.parametrize(
    "keys", [["parallel.tensor=2"], ["parallel.pipeline=2"], []], ids=["tensor", "pipeline", "data"]
)
def test_while_it_trains_every_layout_finds_the_same(
    keys: list[str], data: Path, alone: dict[str, float | None]
) -> None:
    for said, _ in world.run(2, found, data, keys, False):
        assert said == alone


def test_of_text_there_is_no_accuracy(data: Path) -> None:
    from nlscale.evaluate.accuracy import accuracy

    shards = SimpleNamespace(index={"tokenizer": "bytes"}, directory=Path("data/text"))
    with pytest.raises(UserError, match="data/text holds text, and no task"):
        accuracy(cast(Any, None), cast(Any, SimpleNamespace(shards=shards)))


def test_a_sample_has_to_be_an_example(data: Path) -> None:
    from nlscale.evaluate.accuracy import accuracy

    samples = Samples(TokenShards(data, "validation"), 64)
    with pytest.raises(UserError, match=r"has 32 tokens, and data\.sequence_length is 64"):
        accuracy(cast(Any, None), samples)


class Knowing:
    """Stands in for a model: it says what the solver says, but for every `wrong`-th target."""

    def __init__(self, task: Task, wrong: int) -> None:
        self.vocabulary, self._task, self._wrong = len(task.symbols), task, wrong
        self._asked = 0

    def logits(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, self.vocabulary)
        mark = self._task.symbols.index("?")
        for row, place in (tokens == mark).nonzero().tolist():
            said = self._task.solve(tokens[row, : place + 1].numpy())
            self._asked += 1
            if self._asked % self._wrong == 0:
                said = self._task.padding
            logits[row, place, said] = 1
        return logits


def test_what_is_right_is_counted() -> None:
    task = task_of(TASK)
    known = score(cast(Model, Knowing(task, wrong=10**9)), task, 2, examples=70)
    assert known.targets.share == known.examples.share == 1
    assert known.examples.of == 70 and known.task == task.longer(2)
    some = score(cast(Model, Knowing(task, wrong=10)), task, 1, examples=70)
    assert some.targets.right == some.targets.of - some.targets.of // 10
    assert 0 < some.examples.right < 70
    small = SimpleNamespace(vocabulary=3)
    with pytest.raises(UserError, match="has 5 symbols, and the model knows 3"):
        score(cast(Model, small), task, 1, examples=1)


def test_intervals_are_those_of_wilson() -> None:
    assert Share(10, 100).interval == pytest.approx((0.05523, 0.17437), abs=1e-5)
    assert Share(0, 64).interval == pytest.approx((0, 0.05662), abs=1e-5)
    assert Share(64, 64).interval == pytest.approx((1 - 0.05662, 1), abs=1e-5)


def nlscale(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_run_is_scored_on_the_task_of_its_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, f"data.dir={data}", "model.mixer=gated-delta", "data.sequence_length=32")
    asked = ["eval", "automata", str(tmp_path), "--examples", "20"]
    assert nlscale(*asked, "--json", "--lengths", "1x,3x") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["task"] == str(task_of(TASK)) and said["chance"] == 0.5 and said["step"] == 6
    assert [one["factor"] for one in said["lengths"]] == [1, 3]
    assert [one["length"] for one in said["lengths"]] == [32, 96]
    for one in said["lengths"]:
        assert one["examples"]["of"] == 20
        low, high = one["targets"]["interval"]
        assert low <= one["targets"]["share"] <= high
    assert nlscale(*asked) == 0
    printed = capsys.readouterr().out
    assert "by chance 50.0%" in printed and "4x: aa(longest=32, shortest=17" in printed


def test_a_run_that_cannot_be_scored_is_told_why(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, f"data.dir={data}", "model.mixer=gated-delta", "data.sequence_length=32")
    assert nlscale("eval", "recall", str(tmp_path)) == 2
    assert "use nlscale eval automata" in capsys.readouterr().err
    assert nlscale("eval", "automata", str(tmp_path), "--data", str(tmp_path / "gone")) == 2
    said = capsys.readouterr().err
    assert "no data at" in said and "name the data of the run with --data" in said
    assert nlscale("eval", "automata", str(tmp_path), "--lengths", "2y") == 2
    assert "write such as 1x,2x,4x" in capsys.readouterr().err


@pytest.mark.parametrize("name", shipped.names("recipes/tasks"))
def test_a_recipe_fits_the_task_that_it_says_it_is_for(name: str) -> None:
    config = recipe.load(f"tasks/{name}", []).config
    text = shipped.find(f"tasks/{name}").read_text()
    source, out, family = re.findall(r"--source (\S+) --out (\S+) .*eval (\S+) ", text, re.DOTALL)[
        0
    ]
    task = task_of(source.strip('"'))
    assert config.data.sequence_length == task.length and config.data.dir == out
    assert config.evaluate == ["task"] and task.family == family
    assert config.run.dir in text.split(f"eval {family} ")[1].splitlines()[0]
