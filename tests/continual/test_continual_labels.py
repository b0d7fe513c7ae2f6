"""Accuracy of labels, levels that learn while tasks are scored, and streams of both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import world
from continual.streams import learn, write_stream
from levels.level_runs import VOCABULARY, load, sequences
from numpy.typing import NDArray

import nlscale
from nlscale.cli import main
from nlscale.config.in_context import in_context
from nlscale.config.vocabulary import Config, ContextObjective
from nlscale.continual.labels import accuracy, examples_of, labels_of
from nlscale.continual.methods.learning import Learn, kept_changes, learned_nats
from nlscale.continual.methods.options import LearnOptions
from nlscale.continual.stream import read_stream
from nlscale.data import Samples, TokenShards
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.evaluate.rows import row_nats
from nlscale.generate.learning import LearningStream
from nlscale.levels.spectrum import levels_of
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.layout import process_groups
from nlscale.scaling.sweep import local
from nlscale.scaling.sweep.local import worker_places
from nlscale.scaling.sweep.runs import expand
from nlscale.telemetry.figures import read_records
from nlscale.train.loop import Trainer

LABELS = {"web": ("red", "green"), "books": ("blue", "grey")}
SEPARATOR = 255
METHODS = {"ours": {"periods": {"levels": {"level2": "task", "level1": 3}}, "reset": None}}
STREAM: dict[str, Any] = {
    "metric": "accuracy",
    "methods": METHODS,
    "set": {
        "data.sequence_length": 32,
        "optimizer.learning_rate": 0.02,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("data"), random.Random(1)
    for task, labels in LABELS.items():
        lines = []
        for _ in range(60):
            label = draw.choice(labels)
            prompt = "".join(draw.choices(label + "xyz", k=draw.randint(4, 40))) + ": "
            lines.append(json.dumps({"prompt": prompt, "completion": label}) + "\n")
        (root / f"{task}.jsonl").write_text("".join(lines))
        build([str(root / f"{task}.jsonl")], "bytes", root / task, held_out=0.3)
    return root


def stream(folder: Path, data: Path, **more: Any) -> Path:
    tasks = {task: {"data": str(data / task), "steps": 12} for task in LABELS}
    return write_stream(folder, data, **{**STREAM, "tasks": tasks, **more})


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = stream(tmp_path_factory.mktemp("stream"), data)
    with pytest.raises(SystemExit) as ended:
        main(["continual", str(path)])
    assert not ended.value.code
    return path


def held_out(data: Path, task: str) -> Samples:
    return Samples(TokenShards(data / task, "validation"), 32)


def text(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode("latin1")


def test_labels_are_what_counts_and_the_likeliest_is_said(data: Path) -> None:
    written = {
        (one["prompt"], one["completion"])
        for task in LABELS
        for one in map(json.loads, (data / f"{task}.jsonl").read_text().splitlines())
    }
    examples = [one for task in LABELS for one in examples_of(held_out(data, task))]
    assert {(text(one.prompt), text(one.label[:-1])) for one in examples} <= written
    assert len(examples) > 20 and {one.label[-1] for one in examples} == {SEPARATOR}
    labels = labels_of(examples)
    assert sorted(text(label[:-1]) for label in labels) == ["blue", "green", "grey", "red"]
    asked = []

    def nats(rows: NDArray[np.int64], counts: NDArray[np.bool_]) -> NDArray[np.float64]:
        """A model that holds "grey" for the likeliest after an x, and else "red"."""
        asked.append((rows, counts))
        found = []
        for row, count in zip(rows, counts, strict=True):
            at = np.flatnonzero(count)
            label, prompt = (
                bytes(row[at].tolist()).decode("latin1")[:-1],
                bytes(row[: at[0]].tolist()),
            )
            assert row[at[-1]] == SEPARATOR and at[-1] - at[0] == len(at) - 1
            found.append(float(label != ("grey" if b"x" in prompt else "red")))
        return np.array(found)

    said = ["grey" if 120 in one.prompt[-(33 - 6) :] else "red" for one in examples]
    right = [text(one.label[:-1]) == word for one, word in zip(examples, said, strict=True)]
    assert accuracy(examples, labels, 32, SEPARATOR, nats) == sum(right) / len(right)
    (rows, _), *_ = asked
    assert rows.shape == (4 * len(examples), 33)
    with pytest.raises(UserError, match="nothing is left of the prompt"):
        accuracy(examples, labels, 6, SEPARATOR, nats)


LEARNING = [
    "levels=[{name: a, context: {chunk: 4, objective: ntp, learning_rate: 0.3, reset: never, "
    "blocks: 2}}, {name: b, period: 2, context: {chunk: 8, objective: ntp, learning_rate: 0.3}}]",
    "data.sequence_length=18", "train.micro_batch=2", f"model.vocabulary={VOCABULARY}",
]  # fmt: skip


def asked_rows() -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    counts = np.random.default_rng(4).random((7, 19)) < 0.4
    counts[:, -1] = True
    return np.random.default_rng(3).integers(0, VOCABULARY - 1, (7, 19)), counts


class Read:
    """A run of which a hook wants the last samples."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def last_sequences(self, count: int) -> list[Any]:
        return sequences(self.trainer.config, 5)[-count:]


def asked() -> tuple[dict[str, Any], dict[str, Any]]:
    """What is found of rows and what levels keep, on this rank of a run; and the same, a row at a
    time, by a model and streams that learn."""
    config, (rows, counts) = load(LEARNING), asked_rows()
    levels = in_context(config, ContextObjective.ntp)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
        found: dict[str, Any] = {
            "static": row_nats(trainer, rows, counts, VOCABULARY - 1),
            "learned": learned_nats(trainer, levels, rows, counts),
        }
        before = {k: p.detach().clone() for k, p in trainer.named_parameters().items()}
        hook: Any = object.__new__(Learn)
        hook.run, hook.options = Read(trainer), LearnOptions(sequences=2)
        hook.on_update()
        hook.on_update()
        found["kept"] = {k: x.numpy() for k, x in kept_changes(trainer).items()}
        found["after"] = learned_nats(trainer, levels, rows, counts)
        same = trainer.named_parameters()
        assert all(torch.equal(same[k], p) and same[k].requires_grad for k, p in before.items())
        return found, plainly(config, rows, counts)


def plainly(config: Config, rows: NDArray[np.int64], counts: NDArray[np.bool_]) -> dict[str, Any]:
    levels = in_context(config, ContextObjective.ntp)
    model: Any = Decoder(config, megatron_config(config), VOCABULARY)
    initialize(model, config.run.seed, 0, 1)

    def stream(start: dict[str, torch.Tensor]) -> LearningStream:
        begun = LearningStream(model, VOCABULARY, 1, levels)
        for name, change in begun.changes().items():
            if name in start:
                change.copy_(start[name])
        return begun

    def learned(start: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        each = [stream(start).feed(row[None])[0, 1:].numpy() for row in rows]
        return np.array([nats[c[1:]].sum() for nats, c in zip(each, counts, strict=True)])

    static = []
    for row, count in zip(torch.from_numpy(rows), counts, strict=True):
        logits = model.logits(model.hidden(row[None, :-1], carry=False)[0])[:, 0]
        nats = F.cross_entropy(logits, row[1:], reduction="none").detach().numpy()
        static.append(nats[count[1:]].sum())
    kept: dict[str, torch.Tensor] = {}
    for _ in range(2):
        reading = stream(kept)
        for one in sequences(config, 5)[-2:]:
            reading.begin()
            reading.feed(torch.cat([one.tokens, one.targets[:, -1:]], 1))
        reading.begin()
        # the first MLP of the last two blocks, which is never reset
        kept = {k: x for k, x in reading.changes().items() if ".mlps.0." in k}
    return {
        "static": np.array(static),
        "learned": learned({}),
        "after": learned(kept),
        "kept": {k: x[0].numpy() for k, x in kept.items()},
    }


def test_rows_cost_on_two_ranks_what_they_cost_alone() -> None:
    for found, plain in world.run(2, asked):
        assert np.abs(plain["learned"] - plain["static"]).max() > 1e-3
        assert np.abs(plain["after"] - plain["learned"]).max() > 1e-3
        for name in ("static", "learned", "after"):
            assert np.allclose(found[name], plain[name], rtol=1e-4, atol=1e-4), name
        assert found["kept"].keys() == plain["kept"].keys()
        for name, change in found["kept"].items():
            assert np.abs(change).max() > 1e-4
            assert np.allclose(change, plain["kept"][name], atol=1e-6), name


def said_by(run: Path, data: Path) -> list[float]:
    """The accuracy of a run's model on each task, document by document."""
    model = nlscale.load(run, device="cpu")
    examples = {task: examples_of(held_out(data, task))[:8] for task in LABELS}
    labels = labels_of([one for task in LABELS for one in examples_of(held_out(data, task))])
    found = []
    for own in examples.values():
        right = 0
        for one in own:
            costs = []
            for label in labels:
                ids = torch.tensor([one.prompt[-(33 - 6) :] + label])
                logs = model.logits(ids[:, :-1]).log_softmax(-1)[0]
                each = -logs.gather(-1, ids[0, 1:, None])[:, 0]
                costs.append(float(each[-len(label) :].sum()))
            right += labels[int(np.argmin(costs))] == one.label
        found.append(right / len(own))
    return found


def test_a_stream_of_labels_has_the_accuracies_of_its_models(
    data: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = learn(undisturbed, capsys)
    assert found["metric"] == "accuracy" and found["higher_is_better"]
    ours, folder = found["methods"]["ours"], undisturbed.parent / "runs/ours-seed1234"
    assert ours["matrix"][-1] == said_by(folder, data)
    assert ours["before"] != ours["matrix"][0] and 0 < max(ours["matrix"][1]) <= 1
    (run,) = expand(read_stream(undisturbed).sweep)
    assert [hook.name for hook in run.config.hooks] == ["task-scores", "reset-optimizer"]
    records = [r for r in read_records(folder) if r["kind"] == "train"]
    assert [level["period"] for level in records[-1]["levels"].values()] == [1, 3, 12]
    for figure in ("matrix.png", "curves.png"):
        assert (undisturbed.parent / "runs" / figure).read_bytes().startswith(b"\x89PNG")


def test_two_ranks_learn_a_stream_and_wandb_has_it(
    data: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def places(workers: int | None, ranks: int) -> list[dict[str, str]]:
        return [{**place, "WANDB_MODE": "offline"} for place in worker_places(workers, ranks)]

    monkeypatch.setattr(local, "worker_places", places)
    keys = {**STREAM["set"], "wandb.enabled": True, "train.micro_batch": 4}
    path = stream(tmp_path, data, ranks=2, set=keys)
    found = learn(path, capsys)
    theirs = json.loads((undisturbed.parent / "runs/results.json").read_text())
    matrices = [np.array(one["methods"]["ours"]["matrix"]) for one in (found, theirs)]
    # by tasks of 8 documents; a likelihood that is nearly another's may be rounded past it
    assert np.abs(matrices[0] - matrices[1]).max() <= 2 / 8
    assert list((tmp_path / "runs/ours-seed1234/wandb").glob("offline-run-*/run-*.wandb"))
    log = (tmp_path / "runs/ours-seed1234/train.log").read_text()
    assert "2 ranks" in log


NEVER = {"chunk": 8, "reset": "never"}


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"a": {"periods": {"levels": {"slow": 3}}}}, "no level is called 'slow'"),
        ({"a": {"periods": {}}}, "give periods of some of level0, level1, level2"),
        ({"a": {"context": {"levels": {"level0": 8}}}}, "levels.level0: give keys of its context"),
        (
            {"a": {"set": {"levels": [{"context": {**NEVER, "objective": "ntp"}}]}, "naive": None}},
            "give its context to the method of that name, {context: {levels: {level0: ...}}}",
        ),
        ({"a": {"context": {}}}, "{level2: {chunk: 64, learning_rate: 0.1}}"),
    ],
)
def test_methods_that_say_nothing_are_refused(
    methods: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        read_stream(write_stream(tmp_path, "data", methods=methods))
    assert said in str(raised.value)


def test_a_task_is_no_period_where_tasks_differ_and_boundaries_may_be_unknown(
    tmp_path: Path,
) -> None:
    periods = {"a": {"periods": {"levels": {"level2": "task"}}}}
    with pytest.raises(UserError, match="tasks have 5, 4 steps"):
        read_stream(write_stream(tmp_path, "data", methods=periods))
    never = {"levels": {"level0": NEVER}}
    for method in ({"reset": None}, {"context": never}):
        with pytest.raises(UserError, match="unknown"):
            read_stream(write_stream(tmp_path, "data", methods={"a": method}, boundaries="unknown"))
    at_level = {"a": {"context": {**never, "level": "level1"}}}
    path = write_stream(tmp_path, "data", methods=at_level, boundaries="unknown")
    (run,) = expand(read_stream(path).sweep)
    assert [(hook.name, hook.level) for hook in run.config.hooks] == [
        ("learn-in-context", "level1"),
        ("task-scores", None),
    ]
    assert run.config.levels.spectrum[0].context.objective == ContextObjective.ntp
