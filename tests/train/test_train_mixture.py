"""Runs on a mixture: what they read on any number of ranks, and after they were stopped."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import world
from data.mixtures import folder
from train.test_train_resume import only_until
from train.test_train_run import SMALL, records, run

from nlscale import cli
from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.cluster.life.signals import StopSignals
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.step.micro_batches import Batch
from nlscale.train.batches import StepReader
from nlscale.train.loop import train
from nlscale.train.mix_plan import mix_plan
from nlscale.train.prepare import Prepared, go_on, prepare

STEPS = ["train.steps=6", "checkpoint.every=3 steps", "train.validate_every=3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    folder(out, "web", documents=20)
    folder(out, "code", documents=4)
    return out


def mixture(root: Path, web: str = "weight: 2", code: str = "weight: 1") -> str:
    return f"data.mixture=[{{dir: {root}/web, {web}}}, {{dir: {root}/code, {code}}}]"


def config_of(root: Path, *overrides: str, **sources: str) -> Config:
    return recipe.load(None, [*SMALL, mixture(root, **sources), *overrides]).config


class _Reads:
    """Stands for a trainer of a rank: keeps what it is given."""

    def __init__(self, config: Config, rank: int, ranks: int) -> None:
        self.config, self.layout = config, SimpleNamespace(data_rank=rank, data_size=ranks)
        self.counters = SimpleNamespace(step=0, samples=0)

    def to_batch(self, rows: Any, separator: int, size: int, counts: Any, of: Any) -> Batch:
        kept = [(int(source), tuple(row)) for source, row in zip(of[0], rows, strict=True)]
        assert len(kept) == size and counts is None and separator == 255
        return kept  # type: ignore[return-value]


def read_by(config: Config, prepared: Prepared, ranks: int, begin: int = 0) -> list[list[Any]]:
    """Source and tokens of each sample of each step from `begin` on, in their order."""
    trainers = [_Reads(config, rank, ranks) for rank in range(ranks)]
    for trainer in trainers:
        trainer.counters.step, trainer.counters.samples = begin, begin * config.train.global_batch
    readers = [StepReader(trainer, prepared) for trainer in trainers]  # type: ignore[arg-type]
    steps = []
    for _ in range(begin, config.train.steps):
        of_ranks = [reader.take() for reader in readers]
        steps.append(
            [row for micro in zip(*of_ranks, strict=True) for part in micro for row in part]
        )
        for trainer in trainers:
            trainer.counters.step += 1
            trainer.counters.samples += config.train.global_batch
    return steps


def test_ranks_read_the_same_samples_whatever_their_number_and_from_any_step(root: Path) -> None:
    config = config_of(root, "train.steps=30", code="weight: 1, epochs: 1")
    prepared = prepare(config)
    one = read_by(config, prepared, 1)
    assert read_by(config, prepared, 2) == one == read_by(config, prepared, 4)
    assert read_by(config, prepared, 2, begin=17) == one[17:]
    assert prepared.sources is not None
    code = prepared.sources.names.index("code")
    seen = [row for step in one for row in step]
    own = Counter(tokens for source, tokens in seen if source == code)
    length = prepared.sources.cuts[0].lengths[code]
    assert sum(own.values()) == length == sum(source == code for source, _ in seen)
    (plan,) = (each for each in mix_plan(config).sources if each.name == "code")
    last = max(step for step, rows in enumerate(one, 1) if any(s == code for s, _ in rows))
    assert (plan.samples, plan.epochs, plan.ends_after_step) == (length, 1.0, last)


def test_a_run_reports_its_sources_and_goes_on_bit_by_bit(root: Path, tmp_path: Path) -> None:
    here = [mixture(root), f"run.dir={tmp_path}", *STEPS, "evaluate=[positions]"]
    world.run(1, run, here, figures=True)
    whole, validated = records(tmp_path, "train"), records(tmp_path, "validation")
    config = config_of(root)
    order = prepare(config).sources
    assert order is not None
    for record in whole:
        counts = order.cuts[0].order.counts(8 * record["step"])
        for name, source in record["sources"].items():
            read = int(counts[order.names.index(name)])
            assert source["tokens"] == 32 * read
            assert source["epochs"] == read / order.cuts[0].lengths[order.names.index(name)]
        before = order.cuts[0].order.counts(8 * record["step"] - 8)
        parts = [(counts - before)[order.names.index(name)] for name in record["sources"]]
        losses = [source["loss"] for source in record["sources"].values()]
        assert np.dot(parts, losses) / 8 == pytest.approx(record["loss"], rel=1e-6)
    for record in validated:
        web, code = (record["sources"][name] for name in ("web", "code"))
        assert record["loss"] == pytest.approx((2 * web["loss"] + code["loss"]) / 3, rel=1e-12)
        sizes = [each["loss"] / each["bits_per_byte"] for each in (web, code)]
        size = (2 * sizes[0] + sizes[1]) / 3  # of a token, in bytes; but for a factor
        assert record["loss"] / record["bits_per_byte"] == pytest.approx(size, rel=1e-9)
    figures = records(tmp_path, "evaluation")[0]
    assert {"web/0-8/loss", "code/8-32/loss"} <= figures.keys()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    only_until(tmp_path, 3)
    world.run(1, run, here)
    again = records(tmp_path, "train")
    kept = ("step", "loss", "tokens", "sources")
    assert [[r[k] for k in kept] for r in again] == [[r[k] for k in kept] for r in whole]
    resumed = Store(tmp_path / "checkpoints").checkpoints()[-1]
    assert compare(resumed, Checkpoint(tmp_path / "later-6", 6))["bitwise"]

    shutil.rmtree(tmp_path / "later-6")
    only_until(tmp_path, 3)
    changed = [mixture(root, code="weight: 4"), *here[1:]]
    (refused,) = world.run(1, run, changed)
    assert (
        "data.mixture: '0.6667 web; 0.3333 code' -> '0.3333 web; 0.6667 code'" in refused["error"]
    )
    (mixed,) = world.run(2, run, [*changed, "resume.allow=[data.mixture]"])[:1]
    assert mixed["steps"] == 6
    counts = [r["sources"]["code"]["tokens"] / 32 for r in records(tmp_path, "train")]
    assert counts[2] == pytest.approx(8, abs=1) and counts[5] == pytest.approx(8 + 16, abs=2)
    state = Store(tmp_path / "checkpoints").checkpoints()[-1].state
    assert [segment["first_sample"] for segment in state["data"]["mixture"]["segments"]] == [0, 24]
    (finished,) = world.run(1, run, changed)  # which is this run now
    assert finished["final_val_loss"] == mixed["final_val_loss"]


def run_recipe(path: Path, overrides: list[str]) -> dict[str, Any]:
    """As `run`, of a recipe."""
    config = recipe.load(str(path), [*SMALL, *overrides]).config
    with StopSignals() as signals:
        return train(config, prepare(config), signals)


def test_the_lines_that_a_build_by_source_prints_are_the_mixture_of_a_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [str(root / "text" / name) for name in ("web", "code")]
    command = ["data", "build", "--source", *sources, "--tokenizer", "bpe:270", "--by-source"]
    command += ["--held-out", "0.3", "--workers", "1", "--out", f"{tmp_path}/a b"]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert not ended.value.code
    printed = capsys.readouterr().out
    path = tmp_path / "mixture.yaml"
    path.write_text(printed[printed.index("data:\n") :].rpartition("\n")[0].rpartition("\n")[0])
    world.run(1, run_recipe, path, [f"run.dir={tmp_path / 'run'}", "train.steps=2"])
    last = records(tmp_path / "run", "train")[-1]
    tokens = {name: source["tokens"] for name, source in last["sources"].items()}
    assert list(tokens) == ["web", "code"] and sum(tokens.values()) == last["tokens"] == 2 * 8 * 32
    assert tokens["web"] > tokens["code"] > 0


def test_a_validation_reads_of_each_source_what_its_weight_makes(root: Path) -> None:
    def counts(sequences: int, **sources: str) -> list[int]:
        config = config_of(root, f"train.validation_sequences={sequences}", **sources)
        return [len(each.samples) for each in prepare(config).validation]

    assert counts(9) == [6, 3]
    assert counts(9, code="weight: 0.01") == [9, 1]
    assert counts(1) == [1, 1]


def test_a_mixture_that_ends_before_the_run_is_refused(root: Path) -> None:
    limited = {"web": "weight: 2, epochs: 1", "code": "weight: 1, epochs: 1"}
    whole = sum(prepare(config_of(root)).sources.cuts[0].lengths)  # type: ignore[union-attr]
    prepare(config_of(root, f"train.steps={whole // 8}", **limited))
    with pytest.raises(UserError) as refused:
        prepare(config_of(root, "train.steps=1000", **limited))
    said = str(refused.value)
    assert f"data.mixture ends after {whole} of the 8,000 samples" in said
    assert f"train.steps={whole // 8}" in said


def test_what_was_read_before_is_not_asked_of_the_new_mixture(root: Path, tmp_path: Path) -> None:
    """Where there is a checkpoint, only what is read from it on has to be enough."""
    of_run = [f"run.dir={tmp_path}", "train.steps=200"]
    late = config_of(root, *of_run, web="weight: 1e-4", code="weight: 1, epochs: 1")
    late.data.mixture[0].epochs = 1
    with pytest.raises(UserError, match=r"data\.mixture ends after"):
        prepare(late)
    (tmp_path / "checkpoints/step-00000198").mkdir(parents=True)
    prepared, web = prepare(late), config_of(root, *of_run, web="weight: 1")
    web.data.mixture.pop()
    begun = prepare(web).data
    state = {"data": begun, "step": 198, "samples": 198 * 8}
    late.data.mixture[0].epochs = None
    assert go_on(late, prepared, state).sources is not None
    late.data.mixture[0].epochs = 1
    with pytest.raises(UserError, match=r"data\.mixture ends after"):
        go_on(late, prepared, {**state, "step": 3, "samples": 24})


def test_the_dry_run_says_what_a_run_would_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mixed.yaml"
    file.write_text(f"data: {{mixture: [{{dir: {root}/web}}, {{dir: {root}/code}}]}}\n")
    asked = ["data", "mix", str(file), *SMALL, "data.mixture.1.epochs=2", "data.temperature=0"]

    def said(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*asked, *more])
        return int(ended.value.code or 0), capsys.readouterr().out

    code, text = said("train.steps=200")
    assert code == 0 and "web" in text and "50.00%" in text and "the end" in text
    code, text = said("train.steps=200", "--json")
    plan = json.loads(text)
    assert [each["epochs"] for each in plan["sources"]][1] == 2.0
    assert sum(each["samples"] for each in plan["sources"]) == plan["samples"] == 1600
    assert plan["sources"][1]["ends_after_step"] is not None
    code, text = said("train.steps=20000", "data.mixture.0.epochs=1", "--json")
    assert code == 2 and json.loads(text)["ends_after_step"] < 20000
