"""Where the machine has no more to give, one line says so, and nothing is counted as lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from data.building.builds import contents, corpus, units

from nlscale.data.building import pool, tokens
from nlscale.data.formats.text import Stream
from nlscale.data.index import UNITS_NAME
from nlscale.errors import UserError


def test_a_file_is_not_lost_for_want_of_memory(tmp_path: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    lines = Stream.lines

    def short(stream: Stream, number: int = 0) -> Any:
        for read, line in enumerate(lines(stream, number)):
            if stream.path.endswith("2.jsonl") and read == 3:
                raise MemoryError
            yield line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "lines", short)
        with pytest.raises(UserError, match=r"memory to read .*2\.jsonl .*fewer --workers"):
            units(sources, out, max_lost=1.0)
    units(sources, out)
    units(sources, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))], ids=repr
)
def test_writing_without_memory_blames_no_disk(tmp_path: Path, error: Exception) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"

    def short(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens._Unit, "write", short)
        with pytest.raises(UserError, match=r"cannot build .*emory.*fewer --workers") as caught:
            units(sources, out)
    assert "make room" not in str(caught.value)
    assert list(out.glob(f"{UNITS_NAME}/survey-*"))


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "Try again"), EOFError()])
def test_a_process_that_cannot_be_started_blames_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sources = corpus(tmp_path / "in")

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(pool, "_Worker", full)
    with pytest.raises(UserError, match=r"cannot start worker process 1 of 2: .*fewer --workers"):
        units(sources, tmp_path / "out", workers=2)
