"""Verbs that write a folder leave one alone that another process is writing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.life import owners

from nlscale.cli import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number} words " * 40)
    return folder


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, int]]:
    """A folder that a process owns, or a thing of that name in it, and the process."""
    folder = tmp_path / "out"
    process = owners.start("own", folder, request.param)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    yield folder, process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def ends(*command: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in command])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("held", ["build"], indirect=True)
def test_two_builds_of_one_data_folder(
    held: tuple[Path, int], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pid = held
    command = ("data", "build", "--source", text, "--tokenizer", "bytes", "--out")
    before = {path.name for path in out.iterdir()}
    assert ends(*command, out) == 2
    said = capsys.readouterr().err
    assert f"{out} is held by nlscale test, process {pid} on" in said and "another --out" in said
    assert {path.name for path in out.iterdir()} == before
    assert ends(*command, tmp_path / "other") == 0
    assert not list((tmp_path / "other").glob(".owner*"))


@pytest.mark.parametrize("held", ["talk.st"], indirect=True)
def test_two_texts_that_go_on_from_one_state(
    held: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before a model is loaded, of which there is none; one that only reads is not."""
    out, pid = held
    command = ("generate", tmp_path / "model", "--state", out / "talk.st")
    before = {path.name for path in out.iterdir()}
    assert ends(*command) == 2
    said = capsys.readouterr().err
    assert f"is held by nlscale test, process {pid} on" in said and "another --state" in said
    assert {path.name for path in out.iterdir()} == before
    (out / "talk.st").touch()
    assert ends(*command, "--state-read-only") == 2
    assert "model is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("held", [""], indirect=True)
def test_two_verifications_into_one_folder(
    held: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    out, pid = held
    assert ends("verify-resume", "quickstart", "--at", "3", "--out", out) == 2
    assert f"{out} is held by nlscale test, process {pid} on" in capsys.readouterr().err


def test_a_build_that_comes_to_nothing_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "a" / "out"
    command = ("data", "build", "--source", tmp_path / "empty", "--tokenizer", "bytes")
    assert ends(*command, "--out", out) == 2
    assert not (tmp_path / "a").exists() and "nlscale: " in capsys.readouterr().err
