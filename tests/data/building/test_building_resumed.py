"""A build that goes on after what it read, or was given, is no longer as it was."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from data.building.builds import contents, corpus, units
from data.corpora import everything, lines

from nlscale.data.building import passes, settle, survey, tokens
from nlscale.data.building.work import SURVEY, TOKENS, Work
from nlscale.data.documents import SourceFile, UnreadableError, read_documents
from nlscale.data.index import UNITS_NAME
from nlscale.data.tokenizer import TOKENIZER_NAME
from nlscale.errors import UserError


def fails_at(path: Path, kind: str = "unreadable", why: str = "Input/output error") -> Any:
    """What reads documents, as where a file system fails at one file after some of them."""

    def read(file: SourceFile, field: str, tokenizer: Any = None) -> Any:
        for number, document in enumerate(read_documents(file, field, tokenizer)):
            if file.path == path and number == 4:
                raise UnreadableError(kind, why)
            yield document

    return read


def interrupted(where: object, name: str, build: Any) -> None:
    """Run a build that is interrupted at a function."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, stop)
        with pytest.raises(KeyboardInterrupt):
            build()


def test_a_file_that_can_be_read_again_has_its_duplicates_found(tmp_path: Path) -> None:
    """It was lost when duplicates were looked for, and its unit is surveyed anew after that."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    whole = gzip.compress(lines([f"document {i % 7}" for i in range(10)]), mtime=0)
    path = folder / "a.jsonl.gz"
    (folder / "b.jsonl").write_bytes(lines([f"other {i}" for i in range(5)]))
    options = {"duplicates": "drop", "max_lost": 1.0, "held_out": 0.3}
    path.write_bytes(whole[:10] + b"\xff\xff\xff" + whole[13:])
    os.utime(path, ns=(10**18, 10**18))
    interrupted(settle, "_tokenizer", lambda: units([str(folder)], out, **options))
    path.write_bytes(whole)
    os.utime(path, ns=(10**18, 10**18))
    index = units([str(folder)], out, **options)
    assert len(everything(out)) == 12 and index["duplicates"]["count"] == 3
    units([str(folder)], tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


def test_shards_of_what_was_settled_otherwise_are_written_again(tmp_path: Path) -> None:
    """Its tokenizer has gone, and what could not be read before is there when it is settled."""
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        broken = fails_at(tmp_path / "in" / "a" / "2.jsonl")
        patch.setattr(survey, "read_documents", broken)
        patch.setattr(tokens, "read_documents", broken)
        interrupted(passes, "finish", lambda: units(sources, out, duplicates="drop"))
    assert list(out.glob(f"{UNITS_NAME}/{TOKENS}-*"))
    (out / TOKENIZER_NAME).unlink()
    units(sources, out, duplicates="drop")
    units(sources, tmp_path / "whole", duplicates="drop")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_that_cannot_be_read_any_more_costs_nothing_that_is_finished(tmp_path: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    path = tmp_path / "in" / "b" / "3.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "read_documents", fails_at(path))
        says = r"b/3\.jsonl could be read when it was surveyed, and .* cannot: Input/output error"
        with pytest.raises(UserError, match=says):
            units(sources, out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob(f"{UNITS_NAME}/{TOKENS}-*")}
    assert kept and len(list(out.glob(f"{UNITS_NAME}/{SURVEY}-*"))) > 2
    interrupted(passes, "finish", lambda: units(sources, out))
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    units(sources, out)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_only_what_follows_from_a_changed_file_is_made_again(
    tmp_path: Path, duplicates: str
) -> None:
    """Documents change places, so that as many of as many bytes are there as before."""
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    path = tmp_path / "in" / "a" / "1.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    interrupted(passes, "finish", lambda: units(sources, out, duplicates=duplicates))
    stat = path.stat()
    path.write_bytes(b"".join(reversed(before)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    work = Work(out)
    (changed,) = (
        unit for unit in work.plan.units if path in [file.path for file in work.files(unit)]
    )
    shutil.rmtree(work.path(TOKENS, changed.number))  # as if it had not been written before that
    with pytest.raises(UserError, match=r"changed while .*a/1\.jsonl"):
        units(sources, out, duplicates=duplicates)
    surveys = list(out.glob(f"{UNITS_NAME}/{SURVEY}-*"))
    assert len(surveys) == len(work.plan.units) - 1
    units(sources, out, duplicates=duplicates)
    units(sources, tmp_path / "whole", duplicates=duplicates)
    assert contents(out) == contents(tmp_path / "whole")
