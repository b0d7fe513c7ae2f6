"""Needles: one who reads the prompt finds all of them, one who guesses none; and what is shown."""

from __future__ import annotations

import argparse
import json
import re
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from asked import alone, described, nlscale
from generate.models import saved
from torch import Tensor

from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.data.build import build
from nlscale.data.needles.kinds import FORMS, KINDS
from nlscale.data.needles.prompt import prompt, smallest, solve
from nlscale.data.tasks.build import build_task
from nlscale.data.tasks.examples import Split
from nlscale.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from nlscale.errors import UserError
from nlscale.evaluate.intervals import Share
from nlscale.evaluate.needles import ask
from nlscale.generate.model import Model

TEXT = " ".join(np.random.default_rng(0).choice(["some", "Übung,", "text.", "words\n"], 3000))


def counted(text: str) -> int:
    return len(text.encode())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_finds_the_answer_and_the_prompt_is_as_long_as_was_asked(
    kind: str, form: str
) -> None:
    for number in range(12):
        rng, length = np.random.default_rng(number), (1000, 1700)[number % 2]
        one = prompt(kind, form, rng, number / 11, length, counted, TEXT * (number % 3 > 0))
        assert solve(one.text) == (one.answer, "")
        assert solve(one.text + one.answer[:5]) == (one.answer, one.answer[:5])
        assert one.answer == f" {', '.join(one.references)}."
        room = 2 if KINDS[kind].haystack != "needles" else 120  # of a needle more
        assert length - room <= counted(one.text + one.answer) <= length
        if len(one.references) == 1 and form == "short":  # and it is where it was told to be
            assert one.depths == (number / 11,)
            haystack = one.text[: one.text.rindex("\n")]
            place = haystack.index(one.references[0]) / len(haystack)
            assert abs(place - one.depths[0]) < 0.12


def test_what_is_asked_is_what_the_kinds_are() -> None:
    asked = {
        kind: prompt(kind, "ruler", np.random.default_rng(1), 0.5, 1500, counted, TEXT)
        for kind in KINDS
    }
    assert [len(one.references) for one in asked.values()] == [1, 1, 1, 1, 1, 1, 4, 4, 5]
    assert "The grass is green." in asked["s1"].text and "Übung" not in asked["s1"].text
    assert "Übung" in asked["s2"].text and "grass" not in asked["s2"].text
    assert len(asked["s3"].references[0]) == 36 and asked["s2"].references[0].isdigit()
    assert asked["mk1"].text.count("One of the special magic numbers") == 4
    assert asked["mk2"].text.count("One of the special magic numbers") > 15
    assert "Übung" not in asked["mk3"].text and asked["mk3"].text.count("-4") > 6
    assert asked["vt"].text.count("VAR") == 9
    with pytest.raises(UserError, match=r"of kind mq in the ruler form take \d+ tokens without"):
        prompt("mq", "ruler", np.random.default_rng(1), 0.5, 300, counted, TEXT)


def test_a_haystack_may_be_exactly_long_enough() -> None:
    text = TEXT.replace("Ü", "U")[:900]
    for size in (900, 500):  # and a text that is longer than that
        length = smallest("s2", "short", counted) + size
        one = prompt("s2", "short", np.random.default_rng(1), 0.5, length, counted, text)
        assert counted(one.text + one.answer) == length and solve(one.text) == (one.answer, "")
    length = smallest("s2", "short", counted) + 900
    with pytest.raises(UserError, match=r"has 899 characters of .* room for 1 tokens more; give"):
        prompt("s2", "short", np.random.default_rng(1), 0.5, length, counted, text[:-1])


def test_prompts_fit_any_tokenizer(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(TEXT + str(number))
    build([str(tmp_path)], "bpe:270", tmp_path / "data", held_out=0.5)
    tokenizer = load_tokenizer(tmp_path / "data")
    for kind in ("s1", "s2", "mk2"):
        one = prompt(
            kind, "ruler", np.random.default_rng(2), 0.3, 800,
            lambda text: len(tokenizer.encode(text)), TEXT,
        )  # fmt: skip
        size = len(tokenizer.encode(one.text)) + len(tokenizer.encode(one.answer))
        assert 700 < size <= 800 and solve(one.text) == (one.answer, "")


class Reading:
    """Stands in for a model: it reads the prompt, and says the answer, or what `wrong` makes of it.

    It reads bytes row by row, pads and pieces included, as a stream does.
    """

    device = torch.device("cpu")

    def __init__(self, config: Config, wrong: float = 0.0) -> None:
        self.config, self.tokenizer = config, cast(Tokenizer, ByteTokenizer())
        self.vocabulary, self._wrong = 256, wrong
        self._rng = np.random.default_rng(5)

    def stream(self, batch: int = 1) -> Reading:
        self._read: list[list[int]] = [[] for _ in range(batch)]
        self._says: list[str | None] = [None] * batch
        return self

    def feed(self, tokens: Tensor, lengths: Tensor | None = None, last: bool = False) -> Tensor:
        assert last
        logits = torch.full((len(tokens), 256), torch.nan)
        for row, ids in enumerate(tokens.tolist()):
            kept = ids[: len(ids) if lengths is None else int(lengths[row])]
            if not kept:
                continue
            self._read[row] += kept
            logits[row] = 0.0
            logits[row, self._next(row)] = 1.0
        return logits

    def _next(self, row: int) -> int:
        text = bytes(self._read[row]).decode(errors="replace")
        if not re.search(r"(is|are|are:|=)( [\w, -]*)?$", text[-200:]):  # which is soon said
            return 32
        try:
            answer, begun = solve(text)
        except ValueError:
            return 32
        if not begun:
            guesses = self._rng.random() < self._wrong
            self._says[row] = " 0000000" if guesses else answer
        said = self._says[row] or answer
        return ord(said[len(begun)]) if len(begun) < len(said) else 10


def options(**changes: Any) -> argparse.Namespace:
    given = {"kinds": None, "lengths": "1x,3x", "samples": 8, "depths": 4, "haystack": None,
             "form": None, "seed": 0, "tokenizer": None}  # fmt: skip
    return argparse.Namespace(**given | changes)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a run on text."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        (folder / f"{number}.txt").write_text(TEXT * 2 + str(number))
    build([str(folder)], "bytes", folder / "data", held_out=0.5)
    return recipe.load(None, [f"data.dir={folder / 'data'}", "data.sequence_length=900"]).config


def ask_it(model: Reading, **changes: Any) -> dict[str, Any]:
    return ask.evaluate(cast(Model, model), options(**changes), alone("needle"))


def test_one_who_reads_finds_all_and_one_who_guesses_none(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "_ROWS", 3)
    monkeypatch.setattr(ask, "_PIECE", 100)
    read = ask_it(Reading(config))
    assert read["kinds"] == list(KINDS) and read["lengths"] == [900, 2700]
    assert read["form"] == "ruler" and read["haystack"] == config.data.dir
    assert [cell["score"]["share"] for cell in read["cells"]] == [1.0] * 18
    assert all(cell["score"]["of"] == 8 for cell in read["cells"])
    assert all(len(c["depths"]) == 4 for c in read["cells"] if c["kind"].startswith("s"))
    guessed = ask_it(Reading(config, wrong=1.0), kinds=["s1", "mv"])
    assert {cell["score"]["share"] for cell in guessed["cells"]} == {0.0}
    some = ask_it(Reading(config, wrong=0.5), kinds=["s1"], lengths="900", samples=40)
    (cell,) = some["cells"]
    low, high = cell["score"]["interval"]
    assert 0.2 < low < cell["score"]["share"] < high < 0.8
    assert sum(d["of"] for d in cell["depths"]) == 40
    assert sum(d["right"] for d in cell["depths"]) == cell["score"]["right"]


def test_a_part_of_what_is_asked_for_counts_as_a_part() -> None:
    rows = [[(0.0, True), (0.5, False)], [(0.2, True), (1.0, True)]]
    cell = ask._cell("mv", 100, rows, 2)
    assert cell["score"]["share"] == 0.75 and cell["score"]["of"] == 2
    assert [d["share"] for d in cell["depths"]] == [1.0, 0.5]


def test_values_that_are_found_together_are_not_taken_for_independent() -> None:
    """Of a sample all of whose values are at one depth: its interval is that of its samples."""
    rows = [[(0.3, number < 6)] * 4 for number in range(10)]
    (depth,) = ask._cell("mv", 100, rows, 2)["depths"]
    low, high = Share(6, 10).interval
    assert depth["of"] == 40 and depth["interval"][0] <= low and depth["interval"][1] >= high
    (depth,) = ask._cell("s1", 100, [row[:1] for row in rows], 2)["depths"]
    assert depth["interval"] == [low, high], "of one value each it is Wilson's"


class Ending(Reading):
    """Ends its first text before it says the answer."""

    def _next(self, row: int) -> int:
        read, end = self._read[row], self.tokenizer.separator
        if row == 0 and end not in read:
            return end
        self._read[row] = [one for one in read if one != end]
        token = super()._next(row)
        self._read[row] = read
        return token


def test_what_is_said_after_the_end_of_text_does_not_count(config: Config) -> None:
    model = Ending(config)
    (cell,) = ask_it(model, kinds=["s1"], lengths="900", samples=2)["cells"]
    said = bytes(model._read[0]).partition(b"\xff")[2]
    assert said[1:7].isdigit() and cell["score"]["share"] == 0.5
    (cell,) = ask_it(model, kinds=["s1"], lengths="900", samples=1)["cells"]
    assert cell["score"]["share"] == 0.0
    assert model._read[0][-1] == ord("s"), "nobody waits for what comes after the end"


def test_prompts_are_the_same_whoever_asks(config: Config) -> None:
    asked = ask._Asked(["s1"], "short", "", "noise", 3)
    (one, again, other) = (
        ask._prompt(asked, "s1", 300, number, 10, ByteTokenizer()) for number in (4, 4, 5)
    )
    assert one == again != other


TASK = "text-needle(length=128, kinds=s1+mk2)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on needles in text."""
    folder = tmp_path_factory.mktemp("trained")
    build_task(f"task:{TASK}", folder / "data", examples=30, held_out=0.2)
    saved(folder / "run", f"data.dir={folder / 'data'}", "model.mixer=gated-delta",
          "model.vocabulary=256", "data.sequence_length=128")  # fmt: skip
    return folder / "run"


def test_a_model_is_asked_what_it_was_trained_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "needle.png"
    command = ["eval", "needle", str(trained), "--samples", "3", "--lengths", "1x,300"]
    assert nlscale(*command, "--figure", str(figure)) == 0
    printed = capsys.readouterr().out
    assert "s1" in printed and "mk2" in printed and "mk1" not in printed
    assert "128 tokens" in printed and "300 tokens" in printed and "short form" in printed
    assert figure.stat().st_size > 10_000
    assert nlscale(*command, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trained_on"].startswith("text-needle(length=128, kinds=s1+mk2, form=short")
    described("needle", said)
    assert len(said["cells"]) == 4


def test_training_and_asking_do_not_share_a_needle(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random numbers that begin alike hide the same value under the same key."""
    from nlscale.data import Samples, TokenShards

    def told(texts: list[str]) -> set[str]:
        found = [re.findall(r"[\w-]+ is \d{7}\.", text) for text in texts]
        assert all(found)
        return set(chain(*found))

    def asked() -> set[str]:
        of = ask._Asked(["s1", "mk2"], "short", "", "noise", 0)
        fresh = [ask._prompt(of, kind, 128, n, 30, ByteTokenizer())
                 for kind in of.kinds for n in range(30)]  # fmt: skip
        return told([one.text + one.answer for one in fresh])

    samples = Samples(TokenShards(trained.parent / "data"), 128)
    texts = [bytes(samples[n][:-1].tolist()).rstrip(b"\xff").decode() for n in range(len(samples))]
    known = told(texts)
    assert len(known) > len(texts) and not known & asked()
    draws = np.random.default_rng

    def as_in_training(seed: Any) -> np.random.Generator:
        own = isinstance(seed, list)  # of a prompt, not of what is among its needles
        return draws([seed[0], Split.train.value, seed[3]] if own else seed)

    monkeypatch.setattr(np.random, "default_rng", as_in_training)
    assert known & asked(), "were they to begin alike, it would be seen"


def test_needles_of_symbols_are_scored_as_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_task("task:needle(length=40)", tmp_path / "data", examples=20, held_out=0.2)
    saved(tmp_path / "run", f"data.dir={tmp_path / 'data'}", "model.mixer=gated-delta",
          "data.sequence_length=40")  # fmt: skip
    command = ["eval", "needle", str(tmp_path / "run"), "--samples", "4", "--lengths"]
    assert nlscale(*command, "1x,2x", "--json", str(tmp_path / "out.json")) == 0
    described("needle of symbols", json.loads((tmp_path / "out.json").read_text()))
    assert "by chance 10.0%" in capsys.readouterr().out
    assert nlscale(*command, "1k") == 2
    assert "trained on a task of symbols" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "32"], "of kind s1 in the short form take"),
        (["--kinds", "s1,mk7"], "no kind of needle is called 'mk7'; did you mean"),
        (["--lengths", "1y"], "write such as 1x,4x or 512,2k"),
        (["--kinds", "s2", "--haystack", "gone.txt"], "cannot read the haystack gone.txt"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str], said: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nlscale("eval", "needle", str(trained), "--samples", "3", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
