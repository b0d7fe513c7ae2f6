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
from asked import described, nlscale
from generate.models import saved
from torch import Tensor

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


Said = dict[str, float | None]


def found(data: Path, keys: list[str], counts_alone: bool) -> tuple[Said, Said, Said]:
    """What `evaluate: [task, positions]` says on this rank; and both by hand, of one rank."""
    from nlscale.evaluate.accuracy import accuracy
    from nlscale.evaluate.position.training import positions
    from nlscale.levels.spectrum import spectrum
    from nlscale.parallel.layout import process_groups
    from nlscale.step.trainer import Trainer

    config = recipe.load(None, [f"data.dir={data}", *KEYS, *keys]).config
    samples = Samples(TokenShards(data, "validation"), 32)
    counted = torch.zeros(3, 32, dtype=torch.float64)  # targets, right ones, nats, by position
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 1), 8)
        random = torch.get_rng_state()
        right, by_position = accuracy(trainer, samples), positions(trainer, samples)
        assert torch.equal(torch.get_rng_state(), random), "a resumed run would draw others"
        assert all(p.grad is None for stage in trainer.stages for p in stage.parameters())
        for number in range(11 if counts_alone else 0):
            (stage,), row = trainer.stages, torch.from_numpy(samples[number])[None]
            with torch.no_grad():
                logits = stage.logits(stage.hidden(row[:, :-1])[0])[:, 0]
            mask = samples.mask(number)
            assert mask is not None
            here, targets = torch.from_numpy(mask[1:]), row[0, 1:]
            nats = -logits.double().log_softmax(-1)[range(32), targets]
            counted += here * torch.stack([here, logits.argmax(-1) == targets, nats])
    early, late, whole = (counted[:, part].sum(1) for part in (slice(8), slice(8, 32), slice(32)))
    by_hand: Said = {"0-8/loss": float(early[2] / early[0])}
    by_hand["8-32/loss"] = float(late[2] / late[0])
    by_hand["accuracy"] = float(whole[1] / whole[0])
    return right, by_position, by_hand


@pytest.fixture(scope="module")
def alone(data: Path) -> tuple[Said, Said]:
    ((right, by_position, by_hand),) = world.run(1, found, data, [], True)
    assert right == {"accuracy": pytest.approx(by_hand.pop("accuracy")), "chance": 0.5}
    assert 0 < right["accuracy"] < 1, "a test of nothing otherwise"
    assert by_position == pytest.approx(by_hand, rel=1e-6)
    early, late = by_position.values()
    assert abs(early - late) > 1e-3, "nor is this one"
    return right, by_position


@pytest.mark.parametrize(
    "keys", [["parallel.tensor=2"], ["parallel.pipeline=2"], []], ids=["tensor", "pipeline", "data"]
)
def test_while_it_trains_every_layout_finds_the_same(
    keys: list[str], data: Path, alone: tuple[Said, Said]
) -> None:
    for right, by_position, _ in world.run(2, found, data, keys, False):
        assert right == alone[0]
        assert by_position == pytest.approx(alone[1], rel=1e-6)


@pytest.mark.parametrize(
    ("length", "ends"),
    [(4096, [64, 256, 1024, 4096]), (256, [16, 64, 256]), (100, [25, 100]), (31, [31]), (1, [1])],
)
def test_ranges_of_positions_share_out_the_context(length: int, ends: list[int]) -> None:
    from nlscale.evaluate.position.training import ranges_of

    assert ranges_of(length) == list(zip([0, *ends[:-1]], ends, strict=True))


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


def test_a_run_is_scored_on_the_task_of_its_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, f"data.dir={data}", "model.mixer=gated-delta", "data.sequence_length=32")
    asked = ["eval", "automata", str(tmp_path), "--examples", "20"]
    assert nlscale(*asked, "--json", "--lengths", "1x,3x") == 0
    said = json.loads(capsys.readouterr().out)
    described("recall, automata, mad, babi", said)
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
