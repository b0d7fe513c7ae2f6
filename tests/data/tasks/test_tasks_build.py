"""A data folder of a task: its index, its samples, its tokenizer, and `nlscale data build`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from nlscale.cli.data import add_arguments
from nlscale.data import Samples, TokenShards, read_index
from nlscale.data.index import INDEX_NAME
from nlscale.data.tasks.build import build_task
from nlscale.data.tasks.examples import Split, example
from nlscale.data.tasks.table import task_of, task_of_index
from nlscale.data.tokenizer import SymbolTokenizer, load_tokenizer
from nlscale.errors import UserError

TEXT = "mqar(vocabulary=20, length=24, pairs=3)"


def nlscale_data(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers().add_parser("data"))
    args = parser.parse_args(["data", *arguments])
    return args.func(args)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task") / "mqar"
    build_task(f"task:{TEXT}", out, examples=50, held_out=0.2, block_tokens=64, shard_tokens=256)
    return out


def test_a_sample_is_an_example(data: Path) -> None:
    task = task_of(TEXT)
    for split, count in ((Split.train, 40), (Split.validation, 10)):
        samples = Samples(TokenShards(data, split.name), task.length)
        assert len(samples) == samples.shards.documents == count
        for number in range(count):
            ids, mask = example(task, split, 0, number)
            np.testing.assert_array_equal(samples[number][:-1], ids)
            counts = samples.mask(number)
            assert counts is not None
            # the last target is the first token of the next example, or the padding at the end
            np.testing.assert_array_equal(counts, [*mask, False])


def test_the_index_says_what_the_data_are(data: Path) -> None:
    index, task = read_index(data), task_of(TEXT)
    assert index["tokenizer"] == f"task:{task}" and index["sources"] == [f"task:{TEXT}"]
    assert index["vocabulary"] == 20 and index["separator"] == 19
    assert index["task"]["task"] == str(task) and index["task"]["length"] == 24
    assert index["task"]["repeated"] == {"train": 0, "validation": 0}
    assert index["splits"]["train"]["counted_tokens"] == 40 * 3
    assert task_of_index(index, data) == task


def test_the_tokenizer_reads_and_writes_symbols(data: Path) -> None:
    tokenizer = load_tokenizer(data)
    assert tokenizer.name == f"task:{task_of(TEXT)}" and tokenizer.vocabulary == 20
    assert tokenizer.decode([0, 9, 19, 8, 18]) == "k0 v0 k8 v9"
    assert tokenizer.encode("k0 v0  k8 v9").tolist() == [0, 9, 8, 18]
    for unknown in ("k9", "_"):
        with pytest.raises(UserError, match=f"'{unknown}' is no symbol of task:mqar"):
            tokenizer.encode(f"k0 {unknown}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"symbols": None}, "no list of symbols"),
        ({"name": 5}, "no name"),
        ({"symbols": ["a"]}, "give from 2"),
        ({"symbols": ["a", "a", "_"]}, "a symbol is there twice"),
        ({"symbols": ["a b", "_"]}, "symbol 'a b' is no word"),
        ({"symbols": ["a", 3, "_"]}, "symbol 3 is no word"),
        ({"symbols": ["a", [], "_"]}, "is no word"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    SymbolTokenizer("x", ["a", "b", "_"]).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


def test_the_same_seed_gives_the_same_bytes(data: Path, tmp_path: Path) -> None:
    def sums(out: Path, seed: int, text: str = TEXT) -> list[str]:
        sizes = {"block_tokens": 64, "shard_tokens": 256}
        index = build_task(f"task:{text}", out, examples=50, held_out=0.2, seed=seed, **sizes)
        return [s["sha256"] for split in index["splits"].values() for s in split["shards"]]

    first = [s["sha256"] for split in read_index(data)["splits"].values() for s in split["shards"]]
    assert sums(tmp_path / "a", 0) == first
    other = sums(tmp_path / "b", 1)
    assert len(other) == len(first) and not set(other) & set(first)


def test_examples_that_come_again_are_counted(tmp_path: Path) -> None:
    index = build_task("task:aa(longest=3, length=9)", tmp_path, examples=100, held_out=0.2)
    assert index["task"]["repeated"]["train"] > 20
    assert index["task"]["repeated"]["validation"] > 0
    with pytest.raises(UserError, match="too few examples to hold some out"):
        build_task("task:aa(longest=1, length=3)", tmp_path, overwrite=True)
    assert read_index(tmp_path)["task"] == index["task"], "nothing is removed for it"


def test_build_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    command = ["build", "--source", "task:parity(longest=8, length=24)", "--out", out]
    assert nlscale_data(*command, "--examples", "30", "--held-out", "0.1") == 0
    printed = capsys.readouterr().out
    assert "task parity(longest=8, shortest=1, length=24): whether a word" in printed
    assert read_index(out)["splits"]["train"]["documents"] == 27
    assert nlscale_data("info", out) == 0
    assert capsys.readouterr().out in printed
    assert nlscale_data(*command, "--examples", "30", "--held-out", "0.1") == 0
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"built from another source .*--overwrite"):
        nlscale_data(*command, "--examples", "31")
    seed = ["--seed", "1", "--overwrite"]
    assert nlscale_data(*command, "--examples", "30", *seed) == 0
    assert read_index(out)["task"]["seed"] == 1
    (tmp_path / "out" / INDEX_NAME).unlink()
    with pytest.raises(UserError, match="which no build left there"):
        nlscale_data(*command)


def test_the_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert nlscale_data("build", "--source", "task:") == 0
    assert "task:s5(longest=16, shortest=1, length=64)\n    the product" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["task:parity"], "no --out; name the data folder"),
        (["task:parity", "task:mqar", "--out", "x"], "a task is a source by itself"),
        (["task:parity", "text.txt", "--out", "x"], "a task is a source by itself"),
        (["task:parity", "--out", "x", "--tokenizer", "bytes"], "--tokenizer is for text"),
        (["task:parity", "--out", "x", "--max-lost", "0.5"], "--max-lost is for text"),
        (["text.txt", "--out", "x"], "no --tokenizer; use bytes, or bpe:N"),
        (["a.txt", "--out", "x", "--tokenizer", "bytes", "--examples", "9"], "is for tasks"),
        (["task:parity", "--out", "x", "--held-out", "1"], "held-out share is 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        nlscale_data("build", "--source", *arguments)
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").glob("*.tar"))
