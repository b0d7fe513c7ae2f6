"""Models come back from runs of any layout, from checkpoints and exports, into any process."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import world
from checkpoint.stores import flip
from generate.models import random_tokens, saved
from train.test_train_run import run, small_data

import nlscale
from nlscale.checkpoint.export.weights import export
from nlscale.checkpoint.store.store import CheckpointError, Store
from nlscale.data import Samples, TokenShards
from nlscale.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from nlscale.errors import UserError

ROOT = Path(__file__).parents[2]
SPREAD = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=40, held_out=0.1)


@pytest.fixture(scope="module")
def spread(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on four ranks that split every layer and the stack; it is only read."""
    folder = tmp_path_factory.mktemp("spread") / "run"
    world.run(4, run, [f"data.dir={data}", f"run.dir={folder}", *SPREAD])
    return folder


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 6, of other weights, to be damaged."""
    saved(tmp_path / "run", step=3, seed=1)
    saved(tmp_path / "run", step=6, seed=2)
    return tmp_path / "run"


def test_a_run_of_any_layout_has_the_validation_loss_it_says(spread: Path, data: Path) -> None:
    model = nlscale.load(spread, device="cpu")
    held_out = Samples(TokenShards(data, "validation"), 32)
    rows = np.stack([held_out[i] for i in range(8)])
    summary = nlscale.read(spread).summary
    assert summary is not None
    assert model.loss(rows) == pytest.approx(summary["final_val_loss"], rel=1e-5)
    assert (model.step, model.vocabulary, model.dtype) == (9, 256, torch.float32)
    assert (model.config.model.d_model, model.config.parallel.tensor) == (64, 1)
    assert "hope, 0.13M parameters, step 9, float32 on cpu" in repr(model)
    text = "a level, a wíndow"
    tokens = model.encode(text)
    assert tokens.shape == (1, len(text) + 1)
    assert model.decode(tokens) == model.decode(tokens[0].tolist()) == text
    assert model.logits(tokens).shape == (*tokens.shape, 256)


def test_run_checkpoint_and_export_are_one_model(two: Path, tmp_path: Path) -> None:
    newest, older = Store(two / "checkpoints").checkpoints()[::-1]
    export(newest, tmp_path / "exported")
    shutil.copytree(newest.path, tmp_path / "best")
    tokens = random_tokens(2, 9)
    same = (two, two / "checkpoints", newest.path, tmp_path / "best", tmp_path / "exported")
    models = [nlscale.load(path, device="cpu") for path in same]
    assert {model.step for model in models} == {6}
    assert all(torch.equal(m.logits(tokens), models[0].logits(tokens)) for m in models)
    other = nlscale.load(str(older.path), device="cpu")
    assert other.step == 3 and not torch.equal(other.logits(tokens), models[0].logits(tokens))


def test_weights_are_in_the_dtype_of_training_or_the_one_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, "train.dtype=bf16")
    assert nlscale.load(tmp_path, device="cpu").dtype == torch.bfloat16
    exact = nlscale.load(tmp_path, device="cpu", dtype=torch.float64)
    fp32 = nlscale.load(tmp_path, device="cpu", dtype=torch.float32)
    tokens = random_tokens(1, 5)
    # of fp32 masters: they have not been through bf16
    assert float((exact.logits(tokens) - fp32.logits(tokens)).abs().max()) < 1e-4
    with pytest.raises(UserError, match=r"dtype torch\.float16 is none of torch\.float32"):
        nlscale.load(tmp_path, dtype=torch.float16)


def test_a_broken_newest_checkpoint_is_passed_over_aloud(two: Path) -> None:
    flip(two / "checkpoints" / "step-00000006" / "__0_0.distcp", 5000)
    with pytest.warns(UserWarning, match=r"step 6 is broken, trying step 3: .*altered") as said:
        assert nlscale.load(two, device="cpu").step == 3
    assert [w.filename for w in said if w.category is UserWarning] == [__file__]
    with pytest.raises(CheckpointError, match="altered"):
        nlscale.load(two / "checkpoints" / "step-00000006")
    flip(two / "checkpoints" / "step-00000003" / "__0_0.distcp", 5000)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        nlscale.load(two)


def test_a_whole_one_is_loaded_without_a_word(two: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        nlscale.load(two, device="cpu")


@pytest.mark.parametrize(
    ("name", "why"),
    [("nothing", "is no folder"), ("empty", "holds no finished checkpoint")],
)
def test_a_folder_without_a_model_says_what_to_give(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"{name} {why}; give") as refused:
        nlscale.load(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_gpu_that_is_not_there_is_one_line(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as here, also where one is
    with pytest.raises(UserError, match=r"device cuda:1: torch finds no GPU here"):
        nlscale.load(two, device="cuda:1")


def test_the_tokenizer_is_that_of_the_data_or_an_assigned_one(two: Path, tmp_path: Path) -> None:
    model = nlscale.load(two, device="cpu")
    with pytest.raises(
        UserError, match=r"the model has no tokenizer: .*model\.tokenizer = .*FOLDER"
    ):
        _ = model.tokenizer
    with pytest.raises(UserError, match="bytes has 256 ids and the model knows 61"):
        model.tokenizer = ByteTokenizer()
    saved(tmp_path / "bpe", "model.vocabulary=61")
    texts = ["the level and the window, the period and the phase"] * 20
    tokenizer = train_bpe(texts, 260)
    tokenizer.vocabulary = 61  # as if it were that small
    model.tokenizer = tokenizer
    assert model.tokenizer is tokenizer
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).vocabulary == 260


def foreign(runs: Path) -> list[Any]:
    """On a rank: a model with a mixer of a package, before and after that is imported."""
    sys.path.insert(0, str(ROOT))
    found: list[Any] = []
    for again in (False, True):
        try:
            if again:
                import examples.additions  # noqa: F401
            model = nlscale.load(runs, device="cpu")
            stream, tokens = model.stream(2), random_tokens(2, 11)
            pieces = [stream.feed(piece) for piece in tokens.split([1, 4, 6], dim=1)]
            whole = model.logits(tokens)
            found.append(float((torch.cat(pieces, 1) - whole).abs().max() / whole.abs().max()))
        except UserError as error:
            found.append(str(error))
    return found


def save_foreign(runs: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import examples.additions  # noqa: F401

    saved(runs, "model.mixer=retention", "run.imports=[examples.additions]")


def test_a_mixer_of_a_package_asks_for_its_import(tmp_path: Path) -> None:
    world.run(1, save_foreign, tmp_path)
    ((refused, difference),) = world.run(1, foreign, tmp_path)
    assert re.search(r"run\.imports=\['examples\.additions'\]\); import that first:", refused)
    assert "'retention' is not one of" in refused and "\n" not in refused
    assert difference < 5e-5


def beside_other_groups(folder: Path) -> list[Any]:
    """On a rank: logits before, between and after process groups of the process' own."""
    from checkpoint.saved_runs import config

    from nlscale.parallel.layout import process_groups

    def begin() -> None:
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    tokens = random_tokens(1, 6)
    first = nlscale.load(folder, device="cpu")
    seen = [first.logits(tokens)]
    assert not dist.is_initialized()
    for _ in range(2):  # a group of one's own begins and ends as if nothing had been loaded
        begin()
        own = dist.group.WORLD
        seen += [first.logits(tokens), nlscale.load(folder, device="cpu").logits(tokens)]
        assert dist.group.WORLD is own
        total = torch.ones(2)
        dist.all_reduce(total, group=dist.new_group([0]))
        dist.destroy_process_group()
        seen.append(first.logits(tokens))
    stream = first.stream()
    begun = [stream.feed(tokens[:, :2])]
    with process_groups(config()) as layout:  # as training begins them
        begun.append(stream.feed(tokens[:, 2:5]))
        assert layout.within_node.tp.size() == 1
        second = nlscale.load(folder, device="cpu")
    begun.append(stream.feed(tokens[:, 5:]))
    seen += [torch.cat(begun, 1), second.logits(tokens)]
    return [float((logits - seen[0]).abs().max()) for logits in seen]


def test_process_groups_of_ones_own_are_not_touched(two: Path) -> None:
    (differences,) = world.run(1, beside_other_groups, two)
    assert len(differences) == 9 and max(differences) < 1e-5


def several_ranks(folder: Path, rendezvous: Path) -> str:
    import os

    store = dist.FileStore(str(rendezvous), 2)
    rank = int(os.environ["RANK"])
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    try:
        nlscale.load(folder)
    except UserError as error:
        return str(error)
    return ""


def test_load_is_for_one_process(two: Path, tmp_path: Path) -> None:
    said = world.run(2, several_ranks, two, tmp_path / "rendezvous")
    assert all("is for one process, and this is rank" in line for line in said)


FACE = """
import sys
sys.modules["torch"] = None  # importing it is an error now
import nlscale
run = nlscale.read(sys.argv[1])
table = run.metrics()
assert run.finished and table.num_rows == 9, table
assert nlscale.__all__ == ["load", "read", "start"]
"""


def test_importing_nlscale_and_reading_a_run_needs_no_torch(spread: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FACE, str(spread)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
