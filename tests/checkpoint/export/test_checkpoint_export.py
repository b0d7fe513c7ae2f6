"""Exported weights: what is in the files, what comes back, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from checkpoint import resume_runs
from checkpoint.saved_runs import config, contents, save, state
from checkpoint.stores import flip
from levels import level_runs
from safetensors.torch import load_file, save_file
from torch import Tensor

from nlscale import cli
from nlscale.checkpoint.export import weights as room
from nlscale.checkpoint.export.weights import export, load_model, read_weights
from nlscale.checkpoint.restore import start_from_weights
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.config.vocabulary import Dtype
from nlscale.errors import UserError
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Iterator[Tensors]:
    """Of a run; the process groups stay, because models are loaded."""
    with process_groups(config()):
        yield contents(1)


@pytest.fixture(scope="module")
def weights(tensors: Tensors) -> Tensors:
    return {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }


@pytest.fixture(scope="module")
def checkpoint(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save(tmp_path_factory.mktemp("runs") / "run", 6, tensors)


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, fp32; only read."""
    folder = tmp_path_factory.mktemp("exports") / "single"
    export(checkpoint, folder)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    shutil.copytree(exported, tmp_path / "copied")
    return tmp_path / "copied"


def shapes(weights: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def loaded(folder: Path) -> Tensors:
    return {name: p.detach() for name, p in load_model(folder).named_parameters()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def test_the_files_hold_whole_weights_under_plain_names(exported: Path, weights: Tensors) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
    assert same(load_file(exported / "model.safetensors"), weights)
    described = json.loads((exported / "config.json").read_text())
    assert described["model_type"] == "hope" and described["torch_dtype"] == "float32"
    assert (described["vocabulary"], described["step"], described["tokens"]) == (61, 6, 768)
    assert [level["period"] for level in described["levels"]] == ["1", "4"]
    assert described["nlscale"] == state(6)["config"]
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert modes == {exported.stat().st_mode & 0o666}


def test_a_model_comes_back_bit_for_bit_and_runs(exported: Path, weights: Tensors) -> None:
    model = load_model(exported)
    assert same({name: p.detach() for name, p in model.named_parameters()}, weights)
    tokens = torch.arange(32).view(2, 16)
    assert model(tokens, tokens).shape == (16, 2)


def test_in_bf16_as_trained_or_as_asked(tensors: Tensors, weights: Tensors, tmp_path: Path) -> None:
    trained = config("train.dtype=bf16")
    checkpoint = save(tmp_path / "run", 6, tensors, state(6, trained))
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert export(checkpoint, tmp_path / "bf16").dtype == Dtype.bf16
    assert same(load_file(tmp_path / "bf16" / "model.safetensors"), rounded)
    assert same(loaded(tmp_path / "bf16"), rounded)
    export(checkpoint, tmp_path / "fp32", Dtype.fp32)
    assert same(loaded(tmp_path / "fp32"), weights)


def test_several_files_with_an_index(
    checkpoint: Checkpoint, weights: Tensors, tmp_path: Path
) -> None:
    folder, limit = tmp_path / "several", 20_000
    written = export(checkpoint, folder, max_file_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2 and written.files == files
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    whole: Tensors = {}
    for file in files:
        part = load_file(folder / file)
        assert {index["weight_map"][name] for name in part} == {file}
        assert sum(t.nbytes for t in part.values()) <= limit or len(part) == 1
        whole |= part
    assert same(whole, weights)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert same(loaded(folder), weights)


def test_boxes_of_any_layout_are_filled(exported: Path, weights: Tensors) -> None:
    name = "head.weight"
    full = weights[name]
    rows = torch.zeros(20, 32, dtype=torch.bfloat16)
    columns = torch.zeros(32, 61).t()[:, 3:9]  # strided
    untouched = torch.ones(4)
    pieces = [
        Piece(f"weights/{name}", (61, 32), (41, 0), rows),
        Piece(f"weights/{name}", (61, 32), (0, 3), columns),
        Piece("exp_avg/norm.weight", (4,), (0,), untouched),
    ]
    read_weights(exported, pieces, shapes(weights))
    assert torch.equal(rows, full[41:61].bfloat16())
    assert torch.equal(columns, full[:, 3:9])
    assert torch.equal(untouched, torch.ones(4))


TRAINED = ["model.vocabulary=32", "levels=[1,4]", "train.steps=3", "train.global_batch=4"]


def train(folder: Path) -> None:
    """On a rank of a world: the store is written with a tensor split in two."""
    resume_runs.train([*TRAINED, "parallel.tensor=2"], folder / "checkpoints")


def start(overrides: list[str], folder: Path) -> Tensors:
    """On a rank of a world: the whole parameters of a trainer that starts from an export."""
    config = level_runs.load([*TRAINED, *overrides])
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), 32)
        start_from_weights(trainer, folder)
        return level_runs.whole_parameters(trainer)


def test_training_starts_from_an_export_on_any_layout(tmp_path: Path) -> None:
    world.run(2, train, tmp_path)
    (checkpoint,) = Store(tmp_path / "checkpoints").checkpoints()
    export(checkpoint, tmp_path / "out", max_file_bytes=20_000)
    files = (tmp_path / "out").glob("*.safetensors")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    layouts = [["parallel.tensor=2", "parallel.pipeline=2"], ["train.micro_batch=1"]]
    for overrides in layouts:
        for parameters in world.run(4, start, overrides, tmp_path / "out"):
            assert same(parameters, {name: weights[name] for name in parameters})
    with pytest.raises(AssertionError, match=r"do not fit the model of .* missing \(blocks\.2"):
        world.run(1, start, ["model.layers=3"], tmp_path / "out")


def test_what_does_not_fit_is_counted_and_named(copied: Path, weights: Tensors) -> None:
    held = dict(weights)
    gone = ("embedding.weight", "blocks.0.norm.weight", "blocks.1.norm.weight", "norm.weight")
    for name in gone:
        del held[name]
    held["blocks.9.norm.weight"] = torch.zeros(3)
    held["head.weight"] = torch.zeros(61, 8)
    held["blocks.0.mixer.eta_bias"] = held["blocks.0.mixer.eta_bias"].int()
    save_file(held, copied / "model.safetensors")
    filled = torch.ones(2)
    pieces = [Piece("weights/blocks.0.mixer.alpha_bias", (2,), (0,), filled)]
    with pytest.raises(UserError) as refused:
        read_weights(copied, pieces, shapes(weights))
    line = str(refused.value)
    assert "\n" not in line
    assert "4 missing (" in line and ", ..." in line
    assert sum(bool(re.search(rf"[( ]{re.escape(name)}[,)]", line)) for name in gone) == 3
    assert "1 unexpected (blocks.9.norm.weight)" in line
    assert "1 of another shape (head.weight is 61x8, the model's 61x32)" in line
    assert "1 not floating point (blocks.0.mixer.eta_bias)" in line
    assert torch.equal(filled, torch.ones(2))


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"there exists.*--out"):
        export(checkpoint, tmp_path / "there")
    assert not any((tmp_path / "there").iterdir())

    def full_disk(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(room, "save_file", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left"):
        export(checkpoint, tmp_path / "out", max_file_bytes=20_000)
    assert os.listdir(tmp_path) == ["there"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        export(checkpoint, tmp_path / "file" / "out")


def test_what_a_killed_export_left_is_no_hindrance(
    checkpoint: Checkpoint, tmp_path: Path, weights: Tensors
) -> None:
    (tmp_path / ".partial-out").mkdir()
    (tmp_path / ".partial-out" / "model-00001-of-00009.safetensors").touch()
    export(checkpoint, tmp_path / "out")
    assert same(loaded(tmp_path / "out"), weights)
    assert len(list((tmp_path / "out").iterdir())) == 2 and os.listdir(tmp_path) == ["out"]


def test_a_broken_checkpoint_is_not_exported(tensors: Tensors, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run", 6, tensors)
    flip(checkpoint.path / "__0_0.distcp", 5000)
    with pytest.raises(UserError, match=r"__0_0\.distcp was altered"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("place", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_pickle_under_another_name_is_refused_and_not_run(
    copied: Path, tmp_path: Path, form: str, place: str
) -> None:
    mark = tmp_path / "it ran"
    (copied / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"norm.weight": place}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with open(copied / place, "wb") as file:
        if form == "pickle":
            pickle.dump(Malicious(mark), file)
        else:
            torch.save({"norm.weight": Malicious(mark)}, file)
    with pytest.raises(UserError, match=r"looks like a pickle, which can run code"):
        load_model(copied)
    assert not mark.exists()
    # it would have run
    with open(copied / place, "rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize(
    "names",
    [
        {"norm.weight": "../model.safetensors"},
        {"norm.weight": "/etc/passwd"},
        {"norm.weight": "model.bin"},
        {"norm.weight": ["model.safetensors"]},
        "model.safetensors",
    ],
)
def test_an_index_names_only_safetensors_files_beside_it(copied: Path, names: Any) -> None:
    (copied / "model.safetensors").rename(copied.parent / "model.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="not a safetensors file beside it"):
        load_model(copied)


def test_files_that_are_missing_or_cut_short_are_named(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file.*again"):
        load_model(copied)
    path.rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors.*pickles.*are not read"):
        load_model(copied)
    index = {"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_model(copied)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, r"no config\.json in .*nlscale checkpoint export"),
        ("{", "cannot read"),
        ("[]", "not a JSON object"),
        ({"model_type": "llama"}, "not of a model exported by"),
        ({"nlscale": None}, "not of a model exported by"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"nlscale": {"model": {}}}, "is damaged"),
        ({"nlscale": {"model": {"vocabulary": 61, "depth": 2}, "levels": {}}}, "model.depth"),
    ],
)
def test_a_config_that_is_not_an_export_is_refused(
    copied: Path, change: str | dict[str, Any] | None, says: str
) -> None:
    path = copied / "config.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=says) as refused:
        load_model(copied)
    assert "\n" not in str(refused.value) and "command line" not in str(refused.value)


def test_another_model_does_not_take_the_weights(copied: Path) -> None:
    path = copied / "config.json"
    described = json.loads(path.read_text())
    described["nlscale"]["model"]["layers"] = 3
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"\d+ missing \(blocks\.2\."):
        load_model(copied)


def test_the_command(
    tensors: Tensors, weights: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def nlscale(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", "export", *arguments])
        return ended.value.code, *capsys.readouterr()

    run = tmp_path / "run"
    save(run, 2, tensors)
    save(run, 6, tensors)
    code, out, err = nlscale(str(run), "--to", "safetensors")
    assert (code, err) == (0, "") and f"{len(weights)} tensors" in out and "fp32" in out
    assert same(loaded(run / "export-step-6"), weights)
    code, out, err = nlscale(str(run), "--to", "safetensors")
    assert (code, out) == (2, "") and "export-step-6 exists" in err and err.count("\n") == 1
    out_folder = str(tmp_path / "of" / "mine")
    one = str(run / "checkpoints" / "step-00000002")
    code, out, err = nlscale(
        one, "--to", "safetensors", "--json", "--dtype", "bf16", "--out", out_folder
    )
    found = json.loads(out)
    assert (code, err) == (0, "") and found["step"] == 2 and found["folder"] == out_folder
    assert found["checkpoint"] == one and found["files"] == ["model.safetensors"]
    assert found["tensors"] == len(weights) and found["dtype"] == "bf16"
    assert found["parameters"] == sum(t.numel() for t in weights.values())
    assert found["bytes"] == 2 * found["parameters"]
    code, _, err = nlscale(str(run), "--to", "pickle")
    assert code == 2 and "safetensors" in err
