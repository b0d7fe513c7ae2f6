"""The `nlscale data` verbs, as a user runs them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from nlscale.cli.data import add_arguments
from nlscale.data import read_index
from nlscale.errors import UserError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers().add_parser("data"))
    args = parser.parse_args(["data", *arguments])
    return args.func(args)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"text number {i}, " * 10)
    (folder / "bad.txt").write_bytes(b"\xe9")
    (folder / "page.html").write_bytes(b"<p>")
    return folder


def test_build_and_info(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = texts.parent / "out"
    command = ["build", "--source", str(texts / "00.txt"), str(texts / "01.txt")]
    command += ["--source", str(texts), "--tokenizer", "bytes", "--out", str(out)]
    with pytest.raises(UserError, match=r"in: 1 of 19 documents .*bad\.txt: .*--max-lost 0\.06"):
        run(*command)
    assert not out.exists()
    command += ["--max-lost", "0.06"]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "seconds" in printed and "bad.txt: not UTF-8" in printed
    assert "bits per byte" in printed and "skipped 1 unreadable" in printed
    assert "not UTF-8 1" in printed and "lost 0 of 21 files" in printed
    assert "not read 1 others in the folders: .html 1" in printed and "page.html" in printed
    assert sum(split["documents"] for split in read_index(out)["splits"].values()) == 20
    assert run("info", str(out)) == 0
    info = capsys.readouterr().out
    assert "validation" in info and "tokenizer bytes" in info
    assert info.startswith(printed.rpartition("\n")[0].rpartition("\n")[0])
    assert run(*command) == 0
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(UserError, match="--overwrite"):
        run(*command, "--held-out", "0.3")
    assert run(*command, "--held-out", "0.3", "--overwrite") == 0


def test_info_names_a_missing_shard(texts: Path) -> None:
    out = texts.parent / "out"
    command = ["build", "--source", str(texts), "--tokenizer", "bpe:270", "--max-lost", "1"]
    run(*command, "--out", str(out))
    (out / "validation-000000.tar").unlink()
    with pytest.raises(UserError, match=r"validation-000000\.tar is missing"):
        run("info", str(out))


def test_a_build_by_source_says_what_came_of_each(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other := texts.parent / "notes.v2").mkdir()
    for i in range(12, 24):
        (other / f"{i}.txt").write_text(f"text number {i}, " * 10)
    out = texts.parent / "out"
    command = ["build", "--source", str(texts), str(other), "--tokenizer", "bytes", "--by-source"]
    command += ["--duplicates", "drop", "--workers", "1", "--out", str(out)]
    with pytest.raises(UserError, match=r"in: 1 of 21 documents .*bad\.txt: .*--max-lost 0\.05"):
        run(*command)
    command += ["--max-lost", "0.06"]
    assert run(*command) == 0
    first, said = capsys.readouterr().out, "notes.v2: 8 duplicates dropped\n"
    assert "\nin: 1 unreadable documents, 1 other files not read\n" + said in first
    lines = [f"    - {{dir: {out}/in}}", f"    - {{dir: {out}/notes.v2}}"]
    assert first.splitlines()[-4:-1] == [first.splitlines()[-4], *lines]
    assert run(*command) == 0
    again = capsys.readouterr()
    assert "up to date" in again.err
    assert again.out.splitlines()[:-1] == first.splitlines()[:-1]
    assert run("info", str(out / "in"), str(out / "notes.v2"), "--no-lengths") == 0
    counts = [f"{split['documents']:,}" for split in read_index(out / "in")["splits"].values()]
    assert counts[0] in capsys.readouterr().out and f"in {out}\n" in first
    with pytest.raises(UserError, match=f"in folders of it: name one of them, such as {out}/in,"):
        run("info", str(out))
    with pytest.raises(UserError, match="--by-source is for text"):
        run("build", "--source", "task:mqar", "--by-source", "--out", str(out / "task"))


@pytest.mark.parametrize("verb", ["build", "info"])
def test_help_reads(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(verb, "--help")
    assert "DIR" in capsys.readouterr().out
