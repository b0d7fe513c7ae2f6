"""Texts that a model goes on learning from: logits against the losses of a stream that learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from generate.models import VOCABULARY, random_tokens, saved

import nlscale
from nlscale.cli import main
from nlscale.data.tokenizer import SymbolTokenizer
from nlscale.errors import UserError
from nlscale.generate import state_file
from nlscale.generate.learned import levels_of
from nlscale.generate.learner import Learner
from nlscale.generate.model import Model
from nlscale.generate.text import Generation

KEYS = [
    "level0.chunk=6", "level0.learning_rate=0.5", "level0.clip=0.4", "level0.blocks=2",
    "level1.chunk=12", "level1.learning_rate=0.3", "level1.pull=0.2",
]  # fmt: skip
STILL = ["level0.chunk=6", "level0.learning_rate=0", "level1.chunk=6", "level1.learning_rate=0"]
EXACT = 1e-10


@pytest.fixture(scope="module", params=["hope", "independent"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    run = tmp_path_factory.mktemp("run")
    form = {"independent": "model.cms=independent"}.get(
        request.param, f"model.mixer={request.param}"
    )
    saved(run, form)
    model = nlscale.load(run, device="cpu", dtype=torch.float64)
    model.tokenizer = SymbolTokenizer("letters", [f"s{i}" for i in range(VOCABULARY)])
    return model


def learner(model: Model, keys: list[str] = KEYS, file: Path | None = None) -> Learner:
    return Learner(model, levels_of(model, keys, file), file)


def test_logits_are_those_that_the_losses_are_of_in_any_pieces_and_rows(model: Model) -> None:
    torch.manual_seed(2)
    tokens = random_tokens(2, 29)
    wanted = model.learning(batch=2, context=KEYS).feed(tokens)[:, 1:]
    pieces = [tokens[:, :20], *tokens[:, 20:25].split(1, dim=1), tokens[:, 25:]]
    stream = learner(model).stream(2)
    logits = torch.cat([stream.feed(piece) for piece in pieces], 1)
    losses = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(losses, wanted, rtol=EXACT, atol=EXACT)
    # ragged, and a row that was chosen: as alone, to the bit
    ragged = learner(model).stream(2)
    ragged.feed(tokens[:, :15], [15, 4])
    one = ragged.select([1, 0])
    assert one.lengths.tolist() == [4, 15]
    last = one.feed(torch.stack([tokens[1, 4:24], tokens[0, 9:29]]), [20, 0], last=True)
    alone = learner(model).stream(1)
    alone.feed(tokens[1:, :4])
    assert torch.equal(last[:1], alone.feed(tokens[1:, 4:24], last=True))
    assert bool(last[1].isnan().all())
    static = model.logits(tokens)
    assert float((static - logits)[:, :6].abs().max()) < EXACT
    assert float((static - logits)[:, 6:].abs().max()) > 1e-3


def test_at_rate_0_it_is_the_model_to_the_bit(model: Model) -> None:
    torch.manual_seed(3)
    tokens = random_tokens(1, 27)
    still, plain = learner(model, STILL).stream(), model.stream()
    for piece in tokens.split([6, 6, 1, 1, 1, 1, 1, 1, 6, 2, 1], dim=1):
        assert torch.equal(still.feed(piece), plain.feed(piece))


def text_of(
    speaker: Learner, model: Model, prompt: str, tokens: int, file: Path | None = None
) -> list[int]:
    """The ids of a text; goes on from the file, where one is given, and saves it."""
    begun = state_file.load(file, model, speaker) if file and file.exists() else None
    generation = Generation(speaker, [prompt], tokens, seed=9, begun=begun)
    list(generation.reading())
    list(generation.writing())
    if file:
        state_file.save(file, generation.begun, model)
    return generation.results[0].ids


def test_a_text_that_is_interrupted_goes_on_as_if_it_were_not(model: Model, tmp_path: Path) -> None:
    at_once = text_of(learner(model), model, "s1 s2 s3", 30)
    parts = [("s1", 0), ("s2 s3", 0), ("", 1), ("", 12), ("", 17)]
    file = tmp_path / "parts.st"
    ids = [text_of(learner(model), model, *part, file) for part in parts]
    assert [token for part in ids for token in part] == at_once
    plain = Generation(model, ["s1 s2 s3"], 30, seed=9)
    list(plain.reading())
    list(plain.writing())
    assert plain.results[0].ids != at_once  # what it learned counts
    with pytest.raises(UserError, match="give the same --context"):
        state_file.load(file, model, learner(model, ["level0.chunk=6"]))
    with pytest.raises(UserError, match="they would by nothing"):
        state_file.load(file, model)


def test_a_new_text_begins_with_what_was_learned(model: Model, tmp_path: Path) -> None:
    torch.manual_seed(4)
    tokens, file = random_tokens(1, 30), tmp_path / "learned.st"
    keys = [*KEYS, "level0.reset=never"]
    first = learner(model, keys, file)
    generation = Generation(first, [tokens[0].tolist()], 0)
    list(generation.reading())
    first.save(file, generation.begun)
    goes_on = model.learning(context=keys)
    goes_on.feed(tokens[:, :-1])
    goes_on.begin()
    wanted = goes_on.feed(tokens)[:, 1:]
    logits = learner(model, keys, file).stream().feed(tokens)
    losses = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert torch.allclose(losses, wanted, rtol=EXACT, atol=EXACT)
    fresh = model.learning(context=keys).feed(tokens)[:, 1:]
    assert float(wanted.mean()) < float(fresh.mean())  # it has read it before


def test_the_command_learns_and_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, symbols = tmp_path / "run", [f"s{i}" for i in range(VOCABULARY)]
    saved(run)
    SymbolTokenizer("letters", symbols).save(tmp_path)
    file = tmp_path / "learned.st"

    def generated(*more: str) -> tuple[int, str, str]:
        arguments = ["--prompt", "s1 s2", "--tokens", "8", "--tokenizer", str(tmp_path), "--json"]
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(run), *arguments, *more])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    keys = ["--context", "level0.chunk=4", "level0.learning_rate=2", "level0.reset=never"]
    known = [generated(*keys, "--learned", str(file)) for _ in range(2)]
    assert [code for code, _, _ in known] == [0, 0]
    first, second = (json.loads(out) for _, out, _ in known)
    assert first["context"][0]["level"] == "level0" and first["learned"] == str(file)
    plain = json.loads(generated()[1])
    assert not plain.keys() & {"context", "learned"}
    # of the first chunk nothing was learned; the second text begins with what was
    probabilities = [x["samples"][0]["log_probabilities"] for x in (plain, first, second)]
    assert probabilities[0][:2] == probabilities[1][:2] != probabilities[2][:2]
    for more, said in (
        (["--learned", str(file)], "give --context LEVEL.reset=never"),
        ([*keys, "--learned", str(file), "--samples", "2"], "take one sample"),
        ([*keys, "--learned", str(file), "--state", str(tmp_path / "s")], "leave out --learned"),
        ([*keys[:2], "--learned", str(file)], "no level keeps what it has learned"),
    ):
        code, _, error = generated(*more)
        assert code and said in error
