"""A build killed before any of its file operations goes on, and ends as one that was not."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.building.builds import contents, corpus, units

from nlscale.data import TokenShards, read_index
from nlscale.data.building import tokens
from nlscale.data.building.work import INDEX, SETTLED, TOKENS, Making, Result, Work
from nlscale.data.index import INDEX_NAME, UNITS_NAME
from nlscale.errors import UserError

_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written stays: only a power cut asks for it to be on the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def in_a_child(work: Callable[[], object]) -> int:
    """Run work in a forked process; its wait status, of exit code 0 or killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return status


def killed_before(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Run work in a process that is killed before so many changes below a folder were made.

    Python itself tells of each file that is opened, renamed or removed: none can be forgotten.

    Returns:
        False: it needed fewer and finished.
    """
    left = number

    def count(event: str, arguments: Any) -> None:
        nonlocal left
        writes = event in _OPERATIONS
        if event == "open" and isinstance(arguments[1], str):
            writes = bool(set(arguments[1]) & set("wax+"))
        if writes and str(folder) in os.fsdecode(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        sys.addaudithook(count)
        work()

    return os.WIFSIGNALED(in_a_child(watched))


def test_killed_before_every_file_operation(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "in")
    options: dict[str, Any] = {"duplicates": "drop", "unit_bytes": 7500, "shard_tokens": 5000}
    units(sources, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    kept = 0
    for number in itertools.count(1):
        out = tmp_path / f"{number}"
        work = lambda out=out: units(sources, out, **options)  # noqa: E731
        killed = killed_before(number, out, work)
        kept += len(list(out.glob(f"{UNITS_NAME}/*-*[0-9]")))
        if killed and not (out / INDEX_NAME).exists():
            with pytest.raises(UserError, match=r"never finished|no data at"):
                read_index(out)
        assert units(sources, out, **options) == read_index(out)
        assert contents(out) == whole
        TokenShards(out).read(0, 5)
        shutil.rmtree(out)
        if not killed:
            break
    assert number > 60 and kept > 3 * number, "units were there to go on from"


def test_killed_while_a_finished_build_is_replaced(tmp_path: Path) -> None:
    """Its index goes before its shards; until then it can be read."""
    sources = corpus(tmp_path / "in")
    old: dict[str, Any] = {"seed": 1, "unit_bytes": 1 << 30}
    new: dict[str, Any] = {"overwrite": True, "unit_bytes": 9000, "shard_tokens": 9000}
    units(sources, tmp_path / "old", **old)
    units(sources, tmp_path / "new", **new)
    whole, read = contents(tmp_path / "new"), 0
    for number in itertools.count(1, 4):
        out = shutil.copytree(tmp_path / "old", tmp_path / f"{number}")
        work = lambda out=out: units(sources, out, **new)  # noqa: E731
        killed = killed_before(number, out, work)
        if (out / INDEX_NAME).exists():
            TokenShards(out)
            read += 1
        units(sources, out, **new)
        assert contents(out) == whole
        shutil.rmtree(out)
        if not killed:
            break
    assert read > 5


def stopped(sources: list[str], out: Path, after: int, **options: Any) -> list[Path]:
    """A build that is interrupted when so many units have their shards; these."""
    written = tokens._Unit.write
    count = 0

    def write(unit: tokens._Unit, surveyed: Result) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        written(unit, surveyed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens._Unit, "write", write)
        with pytest.raises(KeyboardInterrupt):
            units(sources, out, **options)
    return sorted(out.glob(f"{UNITS_NAME}/{TOKENS}-*"))


def test_finished_units_are_kept_and_damaged_ones_made_again(tmp_path: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    made = stopped(sources, out, 4)
    assert len(made) == 4
    kept = {path: path.stat().st_mtime_ns for path in made[0].iterdir()}
    with open(made[1] / "train-000000.tar", "r+b") as shard:
        shard.seek(700)
        shard.write(b"?")
    (made[2] / "train-000000.tar").unlink()
    (made[3] / "result.json").write_bytes(b"x")
    again: list[str] = []

    class Watched(Making):
        def __init__(self, folder: Path, identity: str) -> None:
            again.append(folder.name.partition(".")[0])
            super().__init__(folder, identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlscale.data.building.work.Making", Watched)
        patch.setattr("nlscale.data.building.passes.finish", lambda work: [None])
        units(sources, out)
    assert {path: path.stat().st_mtime_ns for path in made[0].iterdir()} == kept
    assert made[0].name not in again
    assert {path.name for path in made[1:]} <= set(again)
    assert not any(name.startswith("survey") for name in again)
    units(sources, out)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_other_sources_or_options_start_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    stopped(sources, out, 3)
    units(sources, out, seed=3, progress=True)
    assert "starting over" in (said := capsys.readouterr().err) and "other options" in said
    stopped(sources, out, 2, overwrite=True)
    (tmp_path / "in" / "b" / "2.jsonl").write_text('{"text": "another"}\n')
    units(sources, out, progress=True)
    assert f"{tmp_path}/in/b/2.jsonl has changed since" in capsys.readouterr().err
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_source_that_changes_between_the_passes_is_named(tmp_path: Path) -> None:
    """Also where size and time stay what they were; then its unit is surveyed again."""
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    stopped(sources, out, 0)
    path = tmp_path / "in" / "b" / "3.jsonl"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"text 5", b"text 7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(UserError, match=r"changed while .*/b/3\.jsonl; build again") as caught:
        units(sources, out)
    assert "\n" not in str(caught.value)
    assert not list(out.glob("*.tar")) and Work(out).noted(SETTLED) is None
    assert len(list(out.glob(f"{UNITS_NAME}/survey-*"))) == len(Work(out).plan.units) - 1
    units(sources, out)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    """A file system that failed leaves the files as they are, and the build is to go on."""
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    real = tmp_path / "in" / "a" / "2.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        from nlscale.data.building import survey
        from nlscale.data.documents import SourceFile, UnreadableError, read_documents

        def fails(file: SourceFile, field: str, tokenizer: object = None) -> Any:
            if file.path == real:
                raise UnreadableError("unreadable", "Input/output error")
            return read_documents(file, field)

        patch.setattr(survey, "read_documents", fails)
        with pytest.raises(UserError, match="1 of 5 files cannot be read"):
            units(sources, out, max_lost=None)
    units(sources, out)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("most", [1 << 9, 1 << 11, 6000])
def test_a_full_disk_keeps_nothing_wrong(tmp_path: Path, most: int) -> None:
    sources, out, said = corpus(tmp_path / "in"), tmp_path / "out", tmp_path / "said"

    def build() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            units(sources, out, shard_tokens=10_000)
        except UserError as error:
            said.write_text(str(error))

    in_a_child(build)
    line = said.read_text()
    assert line.startswith(f"cannot write {out}: ") and "make room" in line and "\n" not in line
    assert not list(out.glob(f"{UNITS_NAME}/*.partial"))
    units(sources, out, shard_tokens=10_000)
    units(sources, tmp_path / "whole", shard_tokens=10_000)
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_altered_before_the_index_is_written_are_noticed(tmp_path: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nlscale.data.building.finish.finish_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            units(sources, out)
    work = Work(out)
    assert work.noted(INDEX) and work.noted(SETTLED)
    shard = out / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[900] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000002\.tar was altered.*same command again"):
        units(sources, out)
    units(sources, out)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
