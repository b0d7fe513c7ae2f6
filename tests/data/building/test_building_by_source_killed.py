"""A build of a folder for each source goes on wherever it was killed, and keeps nothing wrong."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from data.building.builds import contents, corpus, units_by_source
from data.building.test_building_killed import in_a_child, killed_before
from data.building.test_building_resumed import interrupted

from nlscale.data import TokenShards
from nlscale.data.building import finish, passes
from nlscale.data.building.work import INDEX, SURVEY, TOKENS, Work
from nlscale.data.index import INDEX_NAME, UNITS_NAME
from nlscale.data.tokenizer import TOKENIZER_NAME
from nlscale.errors import UserError


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written stays: only a power cut asks for it to be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def whole_of(out: Path) -> list[bool]:
    """Of each folder, whether it is built; of those that are no shard lacks."""
    built = [(out / name / INDEX_NAME).exists() for name in "ab"]
    for name in itertools.compress("ab", built):
        for split in ("train", "validation"):
            TokenShards(out / name, split)  # with checksums
    return built


OPTIONS: dict[str, Any] = {"duplicates": "drop", "unit_bytes": 7500, "shard_tokens": 5000}


def test_killed_before_file_operations(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "in")
    units_by_source(sources, tmp_path / "whole", **OPTIONS)
    whole = contents(tmp_path / "whole")
    for number in itertools.count(1, 4):
        out = tmp_path / f"{number}"
        work = lambda out=out: units_by_source(sources, out, **OPTIONS)  # noqa: E731
        killed = killed_before(number, out, work)
        whole_of(out)
        units_by_source(sources, out, **OPTIONS)
        assert contents(out) == whole
        shutil.rmtree(out)
        if not killed:
            break
    assert number > 80


def test_killed_before_every_file_operation_of_the_end(tmp_path: Path) -> None:
    sources, written = corpus(tmp_path / "in"), tmp_path / "written"
    units_by_source(sources, tmp_path / "whole", **OPTIONS)
    interrupted(passes, "finish", lambda: units_by_source(sources, written, **OPTIONS))
    whole, seen = contents(tmp_path / "whole"), list[list[bool]]()
    for number in itertools.count(1):
        out = shutil.copytree(written, tmp_path / f"{number}")
        work = lambda out=out: finish.finish(Work(out))  # noqa: E731
        killed = killed_before(number, out, work)
        seen.append(whole_of(out))
        units_by_source(sources, out, **OPTIONS)
        assert contents(out) == whole
        shutil.rmtree(out)
        if not killed:
            break
    assert seen == sorted(seen) and seen.count([True, False]) > 5


def test_killed_while_finished_folders_are_replaced(tmp_path: Path) -> None:
    """Each is the old one, the new one, or none."""
    sources = corpus(tmp_path / "in")
    options: dict[str, Any] = {"unit_bytes": 1 << 30, "shard_tokens": 9000}
    units_by_source(sources, tmp_path / "old", seed=1, **options)
    units_by_source(sources, tmp_path / "new", **options)
    whole, seen = contents(tmp_path / "new"), set()
    for number in itertools.count(1, 3):
        out = shutil.copytree(tmp_path / "old", tmp_path / f"{number}")
        work = lambda out=out: units_by_source(sources, out, overwrite=True, **options)  # noqa: E731
        killed = killed_before(number, out, work)
        seen.add(tuple(whole_of(out)))
        units_by_source(sources, out, overwrite=True, **options)
        assert contents(out) == whole
        shutil.rmtree(out)
        if not killed:
            break
    assert seen == set(itertools.product([True, False], repeat=2))


def between_two_folders(sources: list[str], out: Path, **options: Any) -> None:
    """A build that is interrupted when one folder of two is finished."""
    done: list[Path] = []

    def once(folder: Path, index: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(folder)
        finish_folder(folder, index)

    finish_folder = finish.finish_folder  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "finish_folder", once)
        with pytest.raises(KeyboardInterrupt):
            units_by_source(sources, out, **options)
    assert whole_of(out) == [True, False] and Work(out).noted(INDEX)


def test_a_folder_that_is_finished_is_not_touched_again(tmp_path: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    between_two_folders(sources, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "a").iterdir()}
    units_by_source(sources, out)
    assert {path: path.stat().st_mtime_ns for path in (out / "a").iterdir()} == before
    units_by_source(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["altered", "shard", "tokenizer", "folder"])
def test_what_was_brought_there_and_is_no_longer_what_it_was_is_built_again(
    tmp_path: Path, damage: str
) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    between_two_folders(sources, out)
    shard = out / "b" / "train-000001.tar"
    if damage == "altered":
        data = bytearray(shard.read_bytes())
        data[900] ^= 1
        shard.write_bytes(data)
    elif damage == "folder":
        shutil.rmtree(out / "b")
    else:
        (shard if damage == "shard" else out / "b" / TOKENIZER_NAME).unlink()
    with pytest.raises(UserError, match="same command again") as said:
        units_by_source(sources, out)
    assert "\n" not in str(said.value)
    units_by_source(sources, out)
    units_by_source(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_only_what_follows_from_a_changed_file_is_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents change places, so that as many of as many bytes are there as before."""
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    options: dict[str, Any] = {"duplicates": "drop"}
    path = tmp_path / "in" / "b" / "1.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    interrupted(passes, "finish", lambda: units_by_source(sources, out, **options))
    stat = path.stat()
    path.write_bytes(b"".join(reversed(before)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    work = Work(out)
    (changed,) = (u for u in work.plan.units if path in [file.path for file in work.files(u)])
    shutil.rmtree(work.path(TOKENS, changed.number))  # as if it had not been written before that
    with pytest.raises(UserError, match=r"changed while .*b/1\.jsonl"):
        units_by_source(sources, out, **options)
    assert len(list(out.glob(f"{UNITS_NAME}/{SURVEY}-*"))) == len(work.plan.units) - 1
    path.write_bytes(b"".join(before[:-1]))  # which is seen at once
    units_by_source(sources, out, progress=True, **options)
    assert f"{path} has changed since" in capsys.readouterr().err
    units_by_source(sources, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("most", [1 << 11, 6000])
def test_a_full_disk_keeps_nothing_wrong(tmp_path: Path, most: int) -> None:
    sources, out, said = corpus(tmp_path / "in"), tmp_path / "out", tmp_path / "said"
    options: dict[str, Any] = {"shard_tokens": 10_000}

    def build() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            units_by_source(sources, out, **options)
        except UserError as error:
            said.write_text(str(error))

    in_a_child(build)
    line = said.read_text()
    assert line.startswith(f"cannot write {out}: ") and "make room" in line and "\n" not in line
    assert not list(out.glob(f"{UNITS_NAME}/*.partial"))
    units_by_source(sources, out, **options)
    units_by_source(sources, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")
