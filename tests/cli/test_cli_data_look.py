"""`nlscale data info|verify|sample`, as a user runs them."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from data.corpora import small

from nlscale.cli.data import add_arguments
from nlscale.data.index import SPLITS
from nlscale.errors import UserError


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers().add_parser("data"))
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.func(args)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("look")
    (folder / "notes").mkdir()
    for i in range(10):
        (folder / "notes" / f"{i}.txt").write_text(f"note {i}\n\x1b[31mred\x07 " * (i + 1))
    with open(folder / "asked.jsonl", "w") as out:
        for i in range(20):
            out.write(json.dumps({"prompt": f"{i}? ", "completion": f"It is {i + 1}."}) + "\n")
    small([str(folder / "notes"), str(folder / "asked.jsonl")], folder / "out")
    return folder / "out"


def test_info_of_one(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", data) == 0
    printed = capsys.readouterr().out
    assert "asked.jsonl" in printed and "lengths of documents" in printed and "median" in printed
    assert run("info", data, "--no-lengths") == 0
    assert "lengths" not in capsys.readouterr().out


def test_info_as_json_and_figure(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "lengths.png"
    assert run("info", data, "--json", "--figure", figure) == 0
    said = capsys.readouterr()
    (facts,) = json.loads(said.out)["folders"]
    assert facts["directory"] == str(data) and str(figure) in said.err
    for split in SPLITS:
        there = facts["splits"][split]
        assert there["lengths"]["documents"] == there["documents"]
        assert sum(part["tokens"] for part in there["sources"]) == there["tokens"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--no-lengths"):
        run("info", data, "--no-lengths", "--figure", figure)


def test_info_of_several_is_a_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small([str(data.parent / "notes")], tmp_path / "second")
    assert run("info", data, tmp_path / "second", data, "--figure", tmp_path / "both.svg") == 0
    lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = [
        [cell.strip().replace(",", "") for cell in line]
        for line in lines
        if line and line[1].strip()
    ]
    first, second, together = rows  # the rest is of paths that take several lines
    assert together[0] == "all"
    assert int(first[2]) + int(second[2]) == int(together[2])
    assert (tmp_path / "both.svg").stat().st_size


def test_info_of_a_folder_with_one_split(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "one")
    index = json.loads((data / "index.json").read_text())
    del index["splits"]["validation"]
    (tmp_path / "one" / "index.json").write_text(json.dumps(index))
    assert run("info", tmp_path / "one") == 0
    assert "asked.jsonl" in capsys.readouterr().out
    with pytest.raises(UserError, match="no split validation"):
        run("info", data, tmp_path / "one")


def test_verify(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", data, "--workers", 2) == 0
    assert "whole" in capsys.readouterr().out
    small([str(data.parent / "notes")], tmp_path / "out")
    (tmp_path / "out" / "train-000000.tar").unlink()
    assert run("verify", tmp_path / "out") == 1
    printed = capsys.readouterr().out
    assert "train-000000.tar is missing" in printed and "1 wrong of" in printed
    with pytest.raises(UserError, match="no data at"):
        run("verify", tmp_path / "none")
    with pytest.raises(UserError, match="whenever they are fetched"):
        run("verify", "s3://bucket/data")


def test_samples_show_where_documents_end_and_what_counts(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", data, "-n", 6, "--sequence-length", 60) == 0
    printed = capsys.readouterr().out
    assert printed.count("sample ") == 6 and "a document ends (token " in printed
    assert "? ⟩It is " in printed
    assert "\x1b" not in printed and "\x07" not in printed and r"\x1b[31mred\x07" in printed
    run("sample", data, "-n", 6, "--sequence-length", 60)
    assert capsys.readouterr().out == printed
    run("sample", data, "-n", 6, "--sequence-length", 60, "--seed", 1)
    assert capsys.readouterr().out != printed


def test_raw_samples_are_the_text_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sample", data, "-n", 6, "--sequence-length", 60, "--raw")
    printed = capsys.readouterr().out
    assert "\x1b[31mred\x07" in printed and "document" not in printed and "⟩" not in printed


def test_samples_of_a_recipe_are_those_of_its_run(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = (f"data.dir={data}", "data.sequence_length=50", "run.seed=9")
    run("sample", "quickstart", *keys, "-n", 2)
    of_recipe = capsys.readouterr().out
    run("sample", data, "-n", 2, "--sequence-length", 50, "--seed", 9)
    assert capsys.readouterr().out == of_recipe
    with pytest.raises(UserError, match="overrides a recipe"):
        run("sample", data, "run.seed=9")


def test_samples_of_packed_data_have_its_length(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small([str(data.parent / "asked.jsonl")], tmp_path, pack=48)
    run("sample", tmp_path, "-n", 1, "--split", "validation")
    printed = capsys.readouterr().out
    assert "tokens 0 to 48 of validation" in printed and "does not count" in printed
