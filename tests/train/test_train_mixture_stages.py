"""A run whose mixture changes at its end, with the length of its sequences."""

from __future__ import annotations

import json
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
from nlscale.config import recipe
from nlscale.config.curriculum import stage_of
from nlscale.config.vocabulary import Config
from nlscale.train.batches import StepReader
from nlscale.train.mix_plan import lines, mix_plan
from nlscale.train.prepare import Prepared, prepare

STEPS = ["train.steps=6", "checkpoint.every=3 steps", "train.validate_every=6"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    for name, documents in (("web", 20), ("code", 4), ("books", 8)):
        folder(out, name, documents=documents)
    return out


def in_stages(root: Path) -> list[str]:
    """Web and code; from step 3 web and books; from step 5 the same, twice as long."""
    begin = f"[{{dir: {root}/web, weight: 2}}, {{dir: {root}/code, weight: 1}}]"
    later = f"[{{dir: {root}/web, weight: 1}}, {{dir: {root}/books, weight: 3, epochs: 30}}]"
    last = "{from: 4 steps, sequence_length: 64}"
    return [f"data.mixture={begin}", f"data.stages=[{{from: 2 steps, mixture: {later}}}, {last}]"]


def config_of(root: Path, *overrides: str) -> Config:
    return recipe.load(None, [*SMALL, *in_stages(root), *STEPS, *overrides]).config


def read_by(config: Config, prepared: Prepared, ranks: int) -> list[list[Any]]:
    """Source and tokens of each sample of each step, in their order."""
    trainers = [
        SimpleNamespace(
            config=config,
            layout=SimpleNamespace(data_rank=rank, data_size=ranks),
            counters=SimpleNamespace(step=0, samples=0),
            to_batch=lambda rows, separator, size, counts, of: [
                (int(source), tuple(row)) for source, row in zip(of[0], rows, strict=True)
            ],
        )
        for rank in range(ranks)
    ]
    readers = [StepReader(trainer, prepared) for trainer in trainers]  # type: ignore[arg-type]
    steps = []
    for step in range(1, config.train.steps + 1):
        of_ranks: list[Any] = [reader.take() for reader in readers]
        steps.append(
            [row for micro in zip(*of_ranks, strict=True) for part in micro for row in part]
        )
        for trainer in trainers:
            trainer.counters.step += 1
            trainer.counters.samples += stage_of(prepared.stages, step).global_batch
    return steps


def test_each_step_reads_its_own_mixture_on_any_number_of_ranks(root: Path) -> None:
    config = config_of(root, "train.steps=24")
    prepared = prepare(config)
    steps = read_by(config, prepared, 1)
    assert read_by(config, prepared, 4) == steps and prepared.sources is not None
    names = prepared.sources.names
    read = [{names[source] for source, _ in step} for step in steps]
    assert set.union(*read[:2]) == {"web", "code"}
    assert set.union(*read[2:]) == {"web", "books"}
    assert [{len(row) for _, row in step} for step in steps] == [{33}] * 4 + [{65}] * 20
    for part in (steps[:4], steps[4:]):  # nothing twice before all has come once
        web = [row for step in part for source, row in step if names[source] == "web"]
        assert len(set(web)) == len(web)

    plan = mix_plan(config)
    assert [(each.first_step, each.steps, each.tokens) for each in plan.stages] == [
        (0, 2, 2 * 8 * 32),
        (2, 22, 2 * 8 * 32 + 20 * 8 * 64),
    ]
    for stage in plan.stages:
        taken = steps[stage.first_step : stage.first_step + stage.steps]
        for source in stage.sources:
            rows = [row for step in taken for at, row in step if names[at] == source.name]
            assert (source.samples, source.tokens) == (
                len(rows),
                sum(len(row) - 1 for row in rows),
            )
        assert sum(source.tokens for source in stage.sources) == stage.tokens
    assert [source.name for source in plan.sources] == ["web", "code", "books"]
    assert sum(source.share for source in plan.sources) == pytest.approx(1)
    assert lines(prepared.sources, prepared.folders, config) == [
        "mixture: 0.667 web, 0.333 code",
        "mixture from step 3: 0.25 web, 0.75 books",
    ]


def test_a_run_reports_and_goes_on_in_another_stage_bit_by_bit(root: Path, tmp_path: Path) -> None:
    here = [*in_stages(root), f"run.dir={tmp_path}", *STEPS]
    world.run(1, run, here)
    whole, validated = records(tmp_path, "train"), records(tmp_path, "validation")
    config = config_of(root)
    steps, names = read_by(config, prepare(config), 1), ["web", "code", "books"]
    found = prepare(config).sources
    assert found is not None
    for number, record in enumerate(whole, 1):
        rows = [(found.names[at], len(row) - 1) for step in steps[:number] for at, row in step]
        now = {found.names[at] for at, _ in steps[number - 1]}
        assert list(record["sources"]) == names
        for name, source in record["sources"].items():
            assert source["tokens"] == sum(length for at, length in rows if at == name)
            assert (source["loss"] is not None) == (name in now)
    for record in validated:
        for each in (record, record["of_end"]):
            web, code, books = (each["sources"][name] for name in names)
            assert each["loss"] == pytest.approx((2 * web["loss"] + code["loss"]) / 3, rel=1e-12)
            assert books["loss"] > 0
    assert np.isfinite(json.loads((tmp_path / "summary.json").read_text())["val_bits_per_byte"])

    only_until(tmp_path, 3)  # from which another mixture was read, and another length is to come
    world.run(1, run, here)
    again = records(tmp_path, "train")
    kept = ("step", "loss", "tokens", "sources")
    assert [[r[k] for k in kept] for r in again] == [[r[k] for k in kept] for r in whole]
    resumed = Store(tmp_path / "checkpoints").checkpoints()[-1]
    assert compare(resumed, Checkpoint(tmp_path / "later-6", 6))["bitwise"]

    only = [*here[:1], here[1].replace("weight: 3", "weight: 1"), *here[2:]]
    (refused,) = world.run(1, run, only)
    assert "then 0.25 web; 0.75 books, at most 30 times' -> " in refused["error"]


def test_the_dry_run_shows_each_mixture(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "mix", "quickstart", *SMALL, *in_stages(root), *STEPS, "data.dir=null"])
    said = capsys.readouterr().out
    assert not ended.value.code
    assert "steps 1 to 2: 512 tokens, 16 samples" in said
    assert "steps 3 to 6: 1.54k tokens, 32 samples" in said
    assert said.count("books") == 2 and said.count("code") == 2 and said.count("web") == 3
