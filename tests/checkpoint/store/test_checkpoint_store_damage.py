"""Damage is named and the older checkpoint taken; a forged one is refused and runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint import stores

from nlscale.checkpoint.store import manifest
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.store import CheckpointError, Store

DATA = "__0_0.distcp"


def _extra(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "data flipped": (lambda c: stores.flip(c / DATA, 3000), rf"{DATA} was altered: its sha256"),
    "data truncated": (
        lambda c: os.truncate(c / DATA, 5000),
        rf"{DATA} is truncated: 5000 of \d{{5}} bytes",
    ),
    "data emptied": (lambda c: os.truncate(c / DATA, 0), rf"{DATA} is truncated: 0 of"),
    "data longer": (lambda c: os.truncate(c / DATA, 99999), rf"{DATA} has 99999 bytes instead of"),
    "data missing": (lambda c: (c / DATA).unlink(), rf"{DATA} is missing"),
    "metadata flipped": (lambda c: stores.flip(c / ".metadata", 99), r"\.metadata was altered"),
    "metadata missing": (lambda c: (c / ".metadata").unlink(), r"\.metadata is missing"),
    "state flipped": (lambda c: stores.flip(c / "state.json", 5), r"state\.json was altered"),
    "state missing": (lambda c: (c / "state.json").unlink(), r"state\.json is missing"),
    "manifest missing": (lambda c: (c / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest emptied": (lambda c: os.truncate(c / "manifest.json", 0), r"manifest\.json was al"),
    "unlisted file": (_extra, r"notes\.txt is not listed in manifest\.json"),
    "everything gone": (
        lambda c: [path.unlink() for path in list(c.iterdir())],
        r"manifest\.json is missing",
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, with seeds of the same number."""
    folder = tmp_path_factory.mktemp("stores") / "two"
    for step in (1, 2):
        stores.save(folder, step, seed=step)
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm."""
    return Path(shutil.copytree(two, tmp_path / "store"))


def _falls_back(folder: Path, reason: str) -> None:
    said: list[str] = []
    found = Store(folder).newest_valid(said.append)
    assert found is not None and found.step == 1 and stores.holds(found, 1)
    assert len(said) == 1 and "\n" not in said[0]
    assert said[0].startswith("checkpoint of step 2 is broken, trying step 1: ")
    assert reason in said[0]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_passed_over(folder: Path, damage: str) -> None:
    harm, reason = DAMAGE[damage]
    newest = Store(folder).checkpoints()[1]
    newest.verify()
    harm(newest.path)
    with pytest.raises(CheckpointError, match=reason) as error:
        newest.verify()
    assert str(newest.path) in str(error.value)
    _falls_back(folder, str(error.value))
    # a save of the same step mends it
    stores.save(folder, 2, seed=2)
    assert stores.holds(Store(folder).checkpoints()[1], 2)


def test_any_byte_of_the_manifest_counts(folder: Path) -> None:
    """It has nobody else to vouch for it."""
    newest = Store(folder).checkpoints()[1]
    path = newest.path / "manifest.json"
    data = path.read_bytes()
    for at in range(len(data)):
        stores.flip(path, at)
        with pytest.raises(CheckpointError, match=r"manifest\.json was altered"):
            newest.verify()
        path.write_bytes(data)
    newest.verify()


def test_all_damage_is_listed(folder: Path) -> None:
    newest = Store(folder).checkpoints()[1]
    (newest.path / "state.json").unlink()
    stores.flip(newest.path / ".metadata", 7)
    _extra(newest.path)
    with pytest.raises(CheckpointError) as error:
        newest.verify()
    for problem in (".metadata was altered", "state.json is missing", "notes.txt is not listed"):
        assert problem in str(error.value)


def test_none_is_whole(folder: Path) -> None:
    stores.flip(folder / "step-00000001" / DATA, 1234)
    (folder / "step-00000002" / "state.json").unlink()
    said: list[str] = []
    with pytest.raises(CheckpointError) as error:
        Store(folder).newest_valid(said.append)
    assert "none of the 2 checkpoints" in str(error.value)
    assert "step-00000001 is not whole: __0_0.distcp was altered" in str(error.value)
    assert "step-00000002 is not whole: state.json is missing" in str(error.value)
    assert "trying step 1" in said[0] and "no other is left" in said[1]


@pytest.mark.parametrize(
    ("latest", "complaint"),
    [
        (b"", None),
        (b"step-000", None),
        (b"\xff\x00", None),
        (None, None),
        (b"step-00000001\n", None),  # the process ended before it wrote it anew
        (b"step-00000009\n", "checkpoint of step 9, the last one written, is gone; trying step 2"),
    ],
)
def test_latest_is_not_needed(folder: Path, latest: bytes | None, complaint: str | None) -> None:
    (folder / "LATEST").unlink()
    if latest is not None:
        (folder / "LATEST").write_bytes(latest)
    said: list[str] = []
    found = Store(folder).newest_valid(said.append)
    assert found is not None and found.step == 2
    assert said == ([complaint] if complaint else [])


def test_only_finished_checkpoints_are_listed(folder: Path) -> None:
    for name in ("step-00000003.partial", "step-00000004.deleted", "step-5", "other", "step-x"):
        shutil.copytree(folder / "step-00000002", folder / name)
    (folder / "step-00000006").write_text("a file")
    assert [checkpoint.step for checkpoint in Store(folder).checkpoints()] == [1, 2]
    assert Store(folder / "nowhere").checkpoints() == []
    assert Store(folder / "nowhere").newest_valid(pytest.fail) is None
    assert Store(folder / "nowhere").prune(1, None) == []


@pytest.mark.parametrize(
    ("keep", "every", "removed"),
    [
        (1, None, [1, 2, 3, 4, 5]),
        (2, None, [1, 2, 3, 4]),
        (1, 2, [1, 3, 5]),
        (2, 3, [1, 2, 4]),
        (9, None, []),
    ],
)
def test_prune_keeps_the_newest_and_every_so_many(
    tmp_path: Path, keep: int, every: int | None, removed: list[int]
) -> None:
    for step in range(1, 7):
        stores.save(tmp_path, step, seed=step)
    (tmp_path / "step-00000005.partial").mkdir()
    (tmp_path / "step-00000007.partial").mkdir()
    store = Store(tmp_path)
    assert store.prune(keep, every) == removed
    left = [step for step in range(1, 7) if step not in removed]
    assert [checkpoint.step for checkpoint in store.checkpoints()] == left
    assert all(stores.holds(checkpoint, checkpoint.step) for checkpoint in store.checkpoints())
    # one that is newer than the newest may be being written
    assert [path.name for path in tmp_path.glob("*.partial")] == ["step-00000007.partial"]


def test_prune_deletes_nothing_for_a_broken_one(folder: Path) -> None:
    stores.flip(folder / "step-00000002" / DATA, 1234)
    with pytest.raises(CheckpointError, match=f"{DATA} was altered"):
        Store(folder).prune(1, None)
    assert [checkpoint.step for checkpoint in Store(folder).checkpoints()] == [1, 2]


def test_a_run_that_fell_back_goes_on(tmp_path: Path) -> None:
    """Step 8 is broken, the run resumes from 4 and saves 6: that is what is kept and counted."""
    for step in (2, 4, 8):
        stores.save(tmp_path, step, seed=step)
    stores.flip(tmp_path / "step-00000008" / DATA, 1234)
    stores.save(tmp_path, 6, seed=6)
    store = Store(tmp_path)
    assert store.prune(2, None) == [2]
    found = store.newest_valid(lambda line: None)
    assert found is not None and found.step == 6
    stores.save(tmp_path, 8, seed=9)
    assert store.prune(2, None) == [4]
    found = store.newest_valid(pytest.fail)
    assert found is not None and stores.holds(found, 9)


class _Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.touched}",)


def _forge_metadata(checkpoint: Path, contents: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(contents)
    stores.vouch(checkpoint)


def test_the_command_of_these_tests_does_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Evil(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_data", "shape"])
def test_command_in_the_metadata(folder: Path, tmp_path: Path, place: str) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    evil = _Evil(tmp_path / "touched")
    metadata = pickle.loads((checkpoint.path / ".metadata").read_bytes())
    if place == "planner_data":
        metadata.planner_data = evil
    elif place == "storage_data":
        metadata.storage_data["x"] = evil
    elif place == "shape":
        metadata.state_dict_metadata["windows/tokens"].size = evil
    _forge_metadata(checkpoint.path, pickle.dumps(evil if place == "whole" else metadata))
    checkpoint.verify()  # whoever forges a file can forge its sha256
    with pytest.raises(CheckpointError) as error:
        checkpoint.tensors()
    path = checkpoint.path / ".metadata"
    said = f"refused: {path} holds posix.system, which a checkpoint does not; nothing of it was run"
    assert str(error.value) == said
    with pytest.raises(CheckpointError, match=r"refused: .*posix\.system"):
        checkpoint.read(stores.whole(stores.tensors(2)))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.serialization", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystem"),
        ("torch", "Size.__new__"),
        ("pathlib", "PosixPath"),
    ],
)
def test_no_other_global_is_looked_up(folder: Path, module: str, name: str) -> None:
    """Dotted names reach through a module that is allowed to what it has imported."""
    checkpoint = Store(folder).checkpoints()[1]
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
    _forge_metadata(checkpoint.path, b"\x80\x04" + b"".join(words) + b"\x93.")
    with pytest.raises(CheckpointError, match=f"refused: .* holds {module}.{name}, which"):
        checkpoint.tensors()


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\x80\x04",
        b"hello",
        os.urandom(300),
        pickle.dumps([1, 2]),
        pickle.dumps({"state_dict_metadata": {}}),
        pickle.dumps(torch.distributed.checkpoint.metadata.Metadata({})),
        pickle.dumps(torch.distributed.checkpoint.metadata.Metadata({"a": 1}, storage_data={})),
    ],
    ids=["empty", "start of a pickle", "text", "random", "list", "dict", "nothing", "no tensors"],
)
def test_metadata_that_are_none(folder: Path, contents: bytes) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    _forge_metadata(checkpoint.path, contents)
    with pytest.raises(CheckpointError, match=r"\.metadata (is not the metadata of|holds)"):
        checkpoint.tensors()


@pytest.mark.parametrize(
    ("form", "found"),
    [
        ("zip", "posix.system"),
        ("pickle, protocol 2", "posix.system"),
        ("pickle, protocol 4", "more than tensors"),  # torch does not read on to the name
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_command_in_a_data_file(folder: Path, tmp_path: Path, form: str, found: str) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    stream = io.BytesIO()
    if form == "zip":
        torch.save({"tensor": torch.zeros(9), "more": _Evil(tmp_path / "touched")}, stream)
    else:
        pickle.dump(_Evil(tmp_path / "touched"), stream, protocol=int(form[-1]))
    path = checkpoint.path / DATA
    metadata = pickle.loads((checkpoint.path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = path.stat().st_size, len(stream.getvalue())
    with open(path, "ab") as file:
        file.write(stream.getvalue())
    _forge_metadata(checkpoint.path, pickle.dumps(metadata))
    checkpoint.verify()
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(stores.whole(stores.tensors(2)))
    said = f"refused: {path} holds {found}, which a checkpoint does not; nothing of it was run"
    assert str(error.value) == said
    assert not (tmp_path / "touched").exists()


def test_command_in_json(folder: Path, tmp_path: Path) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    command = pickle.dumps(_Evil(tmp_path / "touched"))
    (checkpoint.path / "state.json").write_bytes(command)
    stores.vouch(checkpoint.path)
    with pytest.raises(CheckpointError, match=r"state\.json is not JSON"):
        _ = checkpoint.state
    (checkpoint.path / "manifest.json").write_bytes(command)
    with pytest.raises(CheckpointError, match=r"manifest\.json was altered"):
        checkpoint.verify()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("path", ["../stray", "/etc/hostname", "manifest.json", "x"])
def test_no_other_file_is_opened(folder: Path, path: str) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    shutil.copy(checkpoint.path / DATA, folder / "stray")
    metadata = pickle.loads((checkpoint.path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    _forge_metadata(checkpoint.path, pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"is not whole: its manifest has no {path}"):
        checkpoint.read(stores.whole(stores.tensors(2)))


@pytest.mark.parametrize("name", ["../stray", "/etc/hostname", "..", ""])
def test_a_manifest_lists_only_its_own_folder(folder: Path, name: str) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    forged = manifest.render(2, {name: Digest(9, "0" * 64)})
    (checkpoint.path / "manifest.json").write_bytes(forged)
    with pytest.raises(CheckpointError, match=r"manifest\.json was altered"):
        checkpoint.verify()


def test_a_checkpoint_under_another_name(folder: Path) -> None:
    (folder / "step-00000002").rename(folder / "step-00000009")
    with pytest.raises(CheckpointError, match=r"manifest\.json is of step 2"):
        Store(folder).checkpoints()[1].verify()


def test_pruning_a_link_leaves_what_it_points_to(folder: Path, tmp_path: Path) -> None:
    (folder / "step-00000001").rename(tmp_path / "elsewhere")
    (folder / "step-00000001").symlink_to(tmp_path / "elsewhere")
    assert Store(folder).prune(1, None) == [1]
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000002"]
    assert (tmp_path / "elsewhere" / DATA).exists()


@pytest.mark.parametrize("damage", ["data truncated", "data emptied", "data missing"])
def test_reading_what_was_not_verified(folder: Path, damage: str) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    DAMAGE[damage][0](checkpoint.path)
    with pytest.raises(CheckpointError, match=rf"{DATA} cannot be read: \S"):
        checkpoint.read(stores.whole(stores.tensors(2)))


def test_altered_state_and_metadata_are_not_used(folder: Path) -> None:
    for name, use in (("state.json", lambda c: c.state), (".metadata", lambda c: c.tensors())):
        checkpoint = Store(folder).checkpoints()[1]
        stores.flip(checkpoint.path / name, 9)
        with pytest.raises(CheckpointError, match=f"{name} was altered"):
            use(checkpoint)


def test_a_newer_format_is_not_guessed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Store(folder).checkpoints()[1]
    with monkeypatch.context() as patch:
        patch.setattr("nlscale.checkpoint.store.manifest._FORMAT", 2)
        stores.vouch(checkpoint.path)
    with pytest.raises(CheckpointError, match="format 2, this nlscale reads 1"):
        checkpoint.verify()
    _falls_back(folder, "format 2")
