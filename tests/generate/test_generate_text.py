"""Texts as they come: characters, stops, batches, and states that are kept."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import torch
from checkpoint.saved_runs import config
from generate import models
from generate.models import VOCABULARY, saved

import nlscale
from nlscale.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SymbolTokenizer,
    Tokenizer,
    train_bpe,
)
from nlscale.errors import UserError
from nlscale.generate import state_file
from nlscale.generate.detokenize import Detokenizer, Stops
from nlscale.generate.model import Model
from nlscale.generate.sampling import Sampling
from nlscale.generate.text import Continuation, Generation, generate

MIXED = "naïve Ωμέγα 漢字 🙂👩‍🚀 Ünïcode "
SYMBOLS = SymbolTokenizer("letters", [f"s{i}" for i in range(VOCABULARY)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    run = tmp_path_factory.mktemp("run")
    saved(run)
    model = nlscale.load(run, device="cpu")
    model.tokenizer = SYMBOLS
    return model


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([MIXED * 40], 300)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """As of Llama 2: a few letters, and bytes for all others; decoding strips a space at first."""
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocabulary = {name: i for i, name in enumerate(names)}
    carrier = hf.Tokenizer(hf.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    norm, decode = hf.normalizers, hf.decoders
    carrier.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    carrier.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    return HuggingFaceTokenizer(carrier, "</s>")


class Scripted:
    """A model of bytes that says one text, whatever it reads, and then ends it."""

    vocabulary = 256
    config = config()

    def __init__(self, says: bytes, prompt: int) -> None:
        self.tokenizer = ByteTokenizer()
        self._says, self._prompt = says + b"\xff", prompt
        self.lengths = torch.zeros(1, dtype=torch.long)

    def stream(self, batch: int = 1) -> Any:
        assert batch == 1
        return self

    def feed(self, tokens: Any, lengths: Any = None, last: bool = False) -> torch.Tensor:
        self.lengths += torch.as_tensor(tokens).shape[1]
        logits = torch.zeros(1, 256)
        logits[0, self._says[max(0, int(self.lengths) - self._prompt)]] = 100.0
        return logits

    def select(self, rows: Sequence[int]) -> Any:
        raise AssertionError("of one row there is nothing to select")


def said(
    text: bytes | str, prompt: str = "a prompt", **options: Any
) -> tuple[list[str], Continuation]:
    """The pieces that came, and the whole."""
    text = text.encode() if isinstance(text, str) else text
    generation = Generation(Scripted(text, len(prompt.encode())), [prompt], **options)
    list(generation.reading())
    pieces = [text for new in generation.writing() for _, text in new]
    return pieces, generation.results[0]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "symbols", "fallback"])
def test_pieces_add_up_to_the_text_in_whole_characters(
    kind: str, bpe: Tokenizer, fallback: Tokenizer
) -> None:
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe, "symbols": SYMBOLS, "fallback": fallback}[
        kind
    ]
    drawn = random.Random(kind)
    for trial in range(60):
        broken = trial % 2 == 1 and kind in ("bytes", "bpe")
        if kind == "symbols" or broken:
            ids = [drawn.randrange(tokenizer.vocabulary) for _ in range(40)]
        else:
            ids = tokenizer.encode("".join(drawn.choices(MIXED, k=20))).tolist()
        cut = drawn.randrange(len(ids))
        first = Detokenizer(tokenizer)
        pieces = [first.push(token) for token in ids[:cut]]
        decoder = Detokenizer(tokenizer, ids[:cut][-16:])
        pieces += [decoder.push(token) for token in ids[cut:]]
        text, whole = "".join(pieces), tokenizer.decode(ids)
        assert text == whole or broken
        # A text that goes on elsewhere is that of one go; no more than what is undecided is kept.
        assert whole.startswith(text) and whole[len(text) :] in ("", "�", "��", "���")
        assert broken or "�" not in text


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_bytes_that_become_no_character_come_too(kind: str, fallback: Tokenizer) -> None:
    """And what is decoded for each does not grow."""
    tokenizer = ByteTokenizer() if kind == "bytes" else fallback
    broken, letter = (1 + 0x80, 258) if kind == "fallback" else (0x80, ord("a"))
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return type(tokenizer).decode(tokenizer, ids)

    tokenizer.decode = decode  # type: ignore[method-assign, assignment]
    try:
        decoder = Detokenizer(tokenizer, [letter])
        pieces = [decoder.push(broken) for _ in range(200)]
        assert len("".join(pieces)) == 197
        pieces += [decoder.push(tokenizer.separator) for _ in range(200)]
        pieces.append(decoder.push(letter))
    finally:
        del tokenizer.decode
    assert "".join(pieces) == "�" * 200 + "a"
    assert longest <= 33


def test_a_text_ends_before_the_first_stop_wherever_it_is_cut() -> None:
    for _ in range(300):
        text = "".join(random.choices("ab", k=14))
        stops = ["".join(random.choices("ab", k=random.randint(2, 5))) for _ in range(2)]
        found = [text.find(stop) for stop in stops if stop in text]
        ends, given, position = Stops(stops), "", 0
        while position < len(text) and not ends.found:
            step = random.randint(1, 4)
            given += ends.push(text[position : position + step])
            assert text.startswith(given)
            position += step
        # A piece may hold two stops, of which the first in the text counts.
        read = text[:position]
        first = [read.find(stop) for stop in stops if stop in read]
        assert ends.found == bool(found) == bool(first)
        assert given + ends.rest() == (text[: min(first)] if first else text)


def test_why_a_text_ends() -> None:
    pieces, one = said("abc def", tokens=5)
    assert (one.text, one.ended, one.ids) == ("abc d", "tokens", list(b"abc d"))
    assert pieces == list("abc d") and one.prompt_tokens == 8
    _, one = said("abc")
    assert (one.text, one.ended, one.ids) == ("abc", "end of text", [*b"abc", 255])
    pieces, one = said("abc END. more", stop=["END.", "more"])
    assert (one.text, one.ended, one.ids) == ("abc ", "stop", list(b"abc END."))
    assert pieces == list("abc "), "nothing of the stop is shown"
    pieces, one = said("abc EN", stop=["END"])
    assert one.text == "abc EN" and pieces[-1] == "EN", "what was held back comes with the end"
    _, one = said("abc", tokens=0)
    assert (one.text, one.ended, one.ids) == ("", "tokens", [])


def test_half_a_character_is_never_shown() -> None:
    pieces, one = said("é漢🙂")
    assert pieces == ["é", "漢", "🙂"]
    pieces, one = said("é漢🙂", tokens=7)
    assert pieces == ["é", "漢"] and one.text == "é漢" and bytes(one.ids) == "é漢🙂".encode()[:7]
    pieces, _ = said(b"\x80a\xc3(")
    assert pieces == ["�a", "�("]


def test_ids_beyond_the_tokenizer_are_never_drawn(model: Model) -> None:
    """Of a vocabulary that was filled up; what the model gives them still counts."""
    model.tokenizer = SymbolTokenizer("few", [f"s{i}" for i in range(5)])
    try:
        hot = Sampling(temperature=50.0, top_p=1.0, repetition_penalty=0.7)
        found = generate(model, "s1", tokens=20, samples=8, sampling=hot)
        with pytest.raises(UserError, match="ids from 2 to 9, and the tokenizer knows 0 to 4"):
            generate(model, [[2, 9]], tokens=1)
    finally:
        model.tokenizer = SYMBOLS
    assert {token for one in found for token in one.ids} == {0, 1, 2, 3, 4}
    assert all(one.ended in ("tokens", "end of text") for one in found)
    one = max(found, key=lambda one: len(one.ids))
    expected = model.logits([[1, *one.ids]])[0, :-1].double().log_softmax(-1)
    expected = expected.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
    assert one.log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)


def test_documents_that_were_trained_apart_begin_anew(tmp_path: Path) -> None:
    saved(tmp_path, "data.document_mask=true")
    model = nlscale.load(tmp_path, device="cpu")
    model.tokenizer = SYMBOLS
    end: int = SYMBOLS.separator
    how: dict[str, Any] = {"tokens": 6, "sampling": Sampling(repetition_penalty=1.5), "seed": 2}
    (fresh,) = generate(model, [[end, 7, 8]], **how)
    (after,) = generate(model, [[1, 2, end, 3, end, 7, 8]], **how)
    assert (after.ids, after.text) == (fresh.ids, fresh.text)
    both = generate(model, [[1, 2, end, 7, 8], [4, 5, 6, 7, 8, 9]], **how)
    assert both[0].ids == fresh.ids
    for parts in (([3, 4, end], [7, 8]), ([3, 4], [5, end, 7, 8]), ([3, end, 7], [8])):
        begun = None
        for part in parts:
            last = Generation(model, [part], **{**how, "tokens": 0}, begun=begun)
            list(last.reading())
            begun = last.begun
        assert begun is not None and begun.tokens == 3
        last = Generation(model, [[]], **how, begun=begun)
        list(last.reading())
        list(last.writing())
        assert (last.results[0].ids, last.results[0].text) == (fresh.ids, fresh.text)


def test_what_is_not_read_to_its_end_is_not_gone_on_from(model: Model) -> None:
    generation = Generation(model, [[1, 2, 3, 4]], tokens=2)
    next(generation.reading(2))
    with pytest.raises(UserError, match=r"reading\(\) to its end first"):
        next(generation.writing())
    with pytest.raises(UserError, match="differ: reading"):
        _ = generation.begun
    with pytest.raises(UserError, match="another Generation"):
        next(generation.reading())
    two = Generation(model, [[1], [2]], tokens=1)
    with pytest.raises(UserError, match="2 texts are no state"):
        _ = two.begun


def test_one_that_is_left_has_what_came() -> None:
    generation = Generation(Scripted(b"abcEN", 1), ["x"], stop=["END"])
    list(generation.reading())
    for count, _ in enumerate(generation.writing()):
        if count == 4:
            break
    assert generation.leave() == [(0, "EN")] and generation.leave() == []
    assert (generation.results[0].text, generation.results[0].ended) == ("abcEN", "interrupted")


def test_samples_are_the_same_in_every_batch(model: Model) -> None:
    prompts = ["s1 s2 s3", "s4", [5, 6, 7, 8, 9, 10, 11], ""]
    both = generate(model, prompts, tokens=12, samples=3, seed=4)
    assert [(one.prompt, one.sample) for one in both[:4]] == [
        ("s1 s2 s3", 0), ("s1 s2 s3", 1), ("s1 s2 s3", 2), ("s4", 0)
    ]  # fmt: skip
    for index, prompt in enumerate(prompts):
        alone = generate(model, [prompt], tokens=12, samples=2, seed=4)
        for one, same in zip(alone, both[3 * index :], strict=False):
            assert (one.ids, one.text, one.ended) == (same.ids, same.text, same.ended)
            assert one.log_probabilities == pytest.approx(same.log_probabilities, abs=1e-4)
    assert len({tuple(one.ids) for one in both}) == len(both)
    other = generate(model, prompts, tokens=12, seed=5)
    assert [one.ids for one in other] != [one.ids for one in both[::3]]


def test_it_is_what_the_model_says(model: Model) -> None:
    """Greedy, token by token, against the logits of the whole sequence; and the probabilities."""
    (one,) = generate(model, "s1 s2 s3", tokens=20, sampling=Sampling(temperature=0))
    ids = [1, 2, 3, *one.ids]
    logits = model.logits([ids])[0, 2:-1].double()
    assert logits.argmax(-1).tolist() == one.ids
    expected = logits.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
    assert one.log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)
    assert one.text == "".join(f" s{i}" for i in one.ids if i != SYMBOLS.separator)
    (penalised,) = generate(
        model, "s1 s2 s3", tokens=20, sampling=Sampling(temperature=0, repetition_penalty=1e9)
    )
    assert len({1, 2, 3, *penalised.ids}) == 3 + len(penalised.ids), "no token twice"


def test_a_model_generates_by_itself(model: Model) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01}
    found = model.generate("s1 s2", tokens=9, samples=2, stop="s7", seed=3, **options)
    assert found == generate(model, ["s1 s2"], 9, 2, Sampling(**options), ["s7"], 3)
    assert len(model.generate(["s1", [2, 3]], tokens=1)) == 2
    with pytest.raises(TypeError, match="top_q"):
        model.generate("s1", top_q=1)


def test_an_empty_prompt_begins_a_document(model: Model) -> None:
    greedy = Sampling(temperature=0)
    (one,) = generate(model, "", tokens=6, sampling=greedy)
    (other,) = generate(model, [[SYMBOLS.separator]], tokens=6, sampling=greedy)
    assert one.ids == other.ids and one.prompt_tokens == 1 and one.prompt == ""


def test_reading_in_pieces_is_reading_at_once(model: Model) -> None:
    prompts = [[i % 60 for i in range(23)], [7] * 5]
    found = []
    for piece in (3, 100):
        generation = Generation(model, prompts, tokens=8, samples=2, seed=1)
        assert sum(generation.reading(piece)) == generation.prompt_tokens == 26
        list(generation.writing())
        found.append([one.ids for one in generation.results])
    assert found[0] == found[1]


def through_a_file(model: Model, path: Path, prompt: str, tokens: int) -> Continuation:
    """One call of a conversation."""
    begun = state_file.load(path, model) if path.exists() else None
    generation = Generation(
        model, [prompt], tokens, sampling=Sampling(repetition_penalty=1.3), seed=9, begun=begun
    )
    list(generation.reading())
    list(generation.writing())
    state_file.save(path, generation.begun, model)
    return generation.results[0]


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_what_is_kept_goes_on_as_if_it_had_not_stopped(mixer: str, tmp_path: Path) -> None:
    saved(tmp_path, f"model.mixer={mixer}")
    model = nlscale.load(tmp_path, device="cpu")
    model.tokenizer = SYMBOLS
    at_once = through_a_file(model, tmp_path / "one.st", "s1 s2 s3", 14)
    parts = [
        through_a_file(model, tmp_path / "parts.st", prompt, tokens)
        for prompt, tokens in (("s1", 0), ("s2 s3", 0), ("", 1), ("", 6), ("", 7))
    ]
    assert [i for part in parts for i in part.ids] == at_once.ids and len(at_once.ids) == 14
    assert "".join(part.text for part in parts) == at_once.text
    facts = [state_file.facts_of(tmp_path / name) for name in ("one.st", "parts.st")]
    assert facts[0] == facts[1] and facts[0].tokens == 17
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "one.st", "parts.st"}


def kept(model: Model, path: Path) -> Path:
    through_a_file(model, path, "s1 s2", 2)
    return path


def test_a_state_of_something_else_is_refused(model: Model, tmp_path: Path) -> None:
    path = kept(model, tmp_path / "a.st")
    saved(tmp_path / "step", step=7)
    saved(tmp_path / "seed", seed=2)
    saved(tmp_path / "mixer", "model.mixer=gated-delta")
    for name in ("step", "seed", "mixer"):
        other = nlscale.load(tmp_path / name, device="cpu")
        with pytest.raises(UserError, match=r"another model \(hope, step 6\)") as refused:
            state_file.load(path, other)
        assert "\n" not in str(refused.value)
    exact = nlscale.load(tmp_path / "seed", device="cpu", dtype=torch.float64)
    with pytest.raises(UserError, match=r"in torch\.float32, and the model is in torch\.float64"):
        state_file.load(path, exact)
    model.tokenizer = SymbolTokenizer("letters", [f"t{i}" for i in range(VOCABULARY)])
    try:
        with pytest.raises(UserError, match=r"another tokenizer than letters.*--tokenizer"):
            state_file.load(path, model)
    finally:
        model.tokenizer = SYMBOLS


def test_a_file_that_is_no_state_is_refused(model: Model, tmp_path: Path) -> None:
    path = kept(model, tmp_path / "a.st")
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:50], b"", b"{}" * 20, whole.replace(b'"facts"', b'"fasts"')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.st is (no state|damaged)") as refused:
            state_file.load(path, model)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="is not a file"):
        state_file.facts_of(tmp_path)
    path.write_bytes(whole)
    assert state_file.load(path, model).tokens == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"tokens": -1}, "tokens=-1; give"),
        ({"samples": 0}, "samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5 must be a whole"),
        ({"tokens": 2.5}, "tokens=2.5; give"),
        ({"samples": True}, "samples=True"),
        ({"prompts": [1, 2, 3]}, "1 is no prompt; give a text, or a list"),
        ({"prompts": [[1.7]]}, r"\[1.7\] is no prompt"),
        ({"prompts": torch.tensor([[1, 2], [3, 4]])}, r"type Tensor; give .*tolist\(\)"),
        ({"stop": [1]}, "a stop is a text"),
        ({"stop": [""]}, "a stop is empty"),
        ({"prompts": [[3, 61]]}, "ids from 3 to 61, and the tokenizer knows 0 to 60"),
        ({"prompts": ["s1 nothing"]}, "'nothing' is no symbol"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: Model, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        generate(model, **{"prompts": ["s1"], **arguments})


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "generate.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.setattr(models, "VOCABULARY", 256)
    monkeypatch.chdir(tmp_path)
    ByteTokenizer().save(tmp_path)
    saved(tmp_path / "runs" / "quickstart", "model.vocabulary=256", "data.dir=.")
    found: dict[str, Any] = {}
    exec("\n".join(blocks), found)
    assert [one.prompt for one in found["texts"]] == ["def ", "def ", "class ", "class "]
    assert "tokens" in capsys.readouterr().out
    assert found["begun"].tokens == 64 and Path("talk.st").is_file()
