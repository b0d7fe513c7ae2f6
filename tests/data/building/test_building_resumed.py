"""A build that goes on after what it read, or was given, is no longer as it was."""

from __future__ import annotations

import gzip
import os
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
