"""Rows of a stream: of different lengths, chosen, forked, begun anew, saved; each as if alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from generate.models import PATHS, VOCABULARY, random_tokens, saved
from torch import Tensor

import nlscale
from nlscale.errors import UserError
from nlscale.generate.model import Model
from nlscale.model.sizes import state_bytes

EXACT = 1e-12
"""Largest |difference| / |largest logit| in float64; seen: 5e-15."""
PRODUCTS = 25
"""Between a token and its logits in the tiny model: in each of 2 blocks 8 of the mixer and 4 of the
MLPs, and the head."""
ROUNDED = 2 * torch.finfo(torch.float32).eps * (2 * PRODUCTS) ** 0.5
"""The same in fp32, 1.7e-6: a product of another number of rows adds in another order, so that both
logits have gathered an eps a product, independent of each other; and the largest of some thousand
differences is taken."""
Load = Callable[..., Model]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """The model of a mixer, or of a pattern of two, in a dtype."""
    runs: dict[tuple[str, ...], Path] = {}

    def of(mixer: str, dtype: torch.dtype = torch.float64, *overrides: str) -> Model:
        key = (mixer, *overrides)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("run")
            name = "pattern" if mixer.startswith("[") else "mixer"
            saved(runs[key], f"model.{name}={mixer}", *overrides)
        return nlscale.load(runs[key], device="cpu", dtype=dtype)

    return of


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("mixer", [*PATHS, "[sliding-window,hope]"])
def test_each_row_of_a_random_schedule_is_as_if_alone(mixer: str, load: Load) -> None:
    """Pieces of any lengths, rows moved, begun anew and saved on the way; a chunk is 4 tokens, a
    window 6."""
    window = ["model.attention.window=6"] if "window" in mixer else []
    model, draw, rows = load(mixer, torch.float64, *window), random.Random(7), 4
    torch.manual_seed(7)
    tokens = random_tokens(rows, 40)
    wanted = [model.logits(row[None])[0] for row in tokens]
    stream, at, held = model.stream(rows), [0] * rows, list(range(rows))
    for _ in range(14):
        n = draw.choice([1, 1, 2, 3, 9])
        lengths = [min(draw.randint(0, n), 40 - t) for t in at]
        given = torch.full((rows, n), -9)  # what is not read may be anything
        for i, (row, t, length) in enumerate(zip(held, at, lengths, strict=True)):
            given[i, :length] = tokens[row, t : t + length]
        last = draw.random() < 0.5
        logits = stream.feed(given, lengths, last=last)
        assert logits.shape == ((rows, VOCABULARY) if last else (rows, n, VOCABULARY))
        for i, (row, t, length) in enumerate(zip(held, at, lengths, strict=True)):
            if last:
                assert bool(logits[i].isnan().all()) == (length == 0)
            read = logits[i, None] if last else logits[i, :length]
            if length:
                until = t + length
                assert far(read, wanted[row][until - 1 if last else t : until]) < EXACT
            at[i] += length
        if draw.random() < 0.3:
            order = draw.sample(range(rows), rows)
            stream, at, held = (
                stream.select(order),
                [at[i] for i in order],
                [held[i] for i in order],
            )
        if draw.random() < 0.2:
            stream.reset([1, 2])
            at[1] = at[2] = 0
        if draw.random() < 0.2:
            stream = model.stream_from(stream.tensors())
        assert stream.lengths.tolist() == at


@pytest.mark.parametrize("mixer", PATHS)
def test_in_fp32_too_neighbours_change_no_more_than_rounding(mixer: str, load: Load) -> None:
    """Or than twice what rounding changes in what a row reads alone, which both sides have: sums of
    a memory that erases nothing grow as it reads, and cancel in what is read."""
    model, exact = load(mixer, torch.float32), load(mixer)
    torch.manual_seed(8)
    tokens, lengths = random_tokens(5, 30), [30, 1, 14, 7, 8]
    stream = model.stream(5)
    begun = stream.feed(tokens, lengths, last=True)
    after = stream.feed(tokens[:, :1], last=True)
    for i, n in enumerate(lengths):
        alone, right = model.stream(), exact.stream()
        for found, piece in ((begun, tokens[i : i + 1, :n]), (after, tokens[i : i + 1, :1])):
            given = alone.feed(piece, last=True)[0]
            own = far(given, right.feed(piece, last=True)[0])
            assert far(found[i], given) < max(ROUNDED, 2 * own)


@pytest.mark.parametrize("mixer", PATHS)
def test_token_by_token_is_at_once(mixer: str, load: Load) -> None:
    for dtype, bound in ((torch.float64, EXACT), (torch.float32, 1e-5)):
        model = load(mixer, dtype, "model.cms=independent")
        torch.manual_seed(9)
        tokens = random_tokens(3, 19)
        stream = model.stream(3)
        one_by_one = torch.cat([stream.feed(token) for token in tokens.split(1, dim=1)], 1)
        assert far(one_by_one, model.logits(tokens)) < bound


SINGLE = "{mixer: hope, memory: {reads_state: true, gain: kalman, chunk_momentum: true}}"


@pytest.mark.parametrize("mixer", ["hope-pure", "gated-delta", f"[{SINGLE},sliding-window,hope]"])
def test_the_state_of_a_sequence_is_as_large_as_is_counted(mixer: str, load: Load) -> None:
    model = load(mixer, torch.float32)
    model.config.data.sequence_length = 8  # ends of chunks
    stream = model.stream(2)
    stream.feed(random_tokens(2, 8))
    held = sum(x.nbytes for x in stream.tensors().values() if x.is_floating_point())
    assert held == 2 * (state_bytes(model.config) or 0) > 0


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_a_fork_goes_on_in_several_ways_and_leaves_the_stream(mixer: str, load: Load) -> None:
    model = load(mixer)
    torch.manual_seed(10)
    tokens, ends = random_tokens(2, 9), random_tokens(3, 5)
    stream = model.stream(2)
    stream.feed(tokens, [9, 6])
    stream.feed(tokens[:, -1:], [0, 1])  # written in place from here on
    fork = stream.select([1, 0, 1])
    pieces = [fork.feed(piece) for piece in ends.split([1, 3, 1], dim=1)]
    second = torch.cat([tokens[1, :6], tokens[1, -1:]])
    for i, begin in enumerate((second, tokens[0], second)):
        whole = model.logits(torch.cat([begin, ends[i]])[None])[0, -5:]
        assert far(torch.cat(pieces, 1)[i], whole) < EXACT
    assert stream.lengths.tolist() == [9, 7] and fork.lengths.tolist() == [12, 14, 12]
    on = stream.feed(ends[:2, :1])
    assert far(on[0, 0], model.logits(torch.cat([tokens[0], ends[0, :1]])[None])[0, -1]) < EXACT


@pytest.mark.parametrize("mixer", ["hope", "gated-delta", "attention"])
def test_a_saved_stream_goes_on_bit_for_bit(mixer: str, load: Load, tmp_path: Path) -> None:
    model = load(mixer, torch.float32)
    torch.manual_seed(11)
    tokens = random_tokens(2, 12)
    stream = model.stream(2)
    stream.feed(tokens[:, :7], [7, 5])
    file = tmp_path / "state.safetensors"
    held = stream.tensors()
    safetensors.torch.save_file(held, file)
    assert stream.nbytes == sum(x.nbytes for x in held.values())
    loaded = model.stream_from(safetensors.torch.load_file(file))
    assert loaded.lengths.tolist() == [7, 5] and loaded.batch == 2
    for piece in tokens[:, 7:].split([1, 4], dim=1):
        assert torch.equal(stream.feed(piece), loaded.feed(piece))
    again = model.stream_from(held)  # what was taken before is not written to
    assert torch.equal(again.tensors()["lengths"], torch.tensor([7, 5]))
    assert all(torch.equal(x, again.tensors()[name]) for name, x in held.items())


def test_tensors_of_another_stream_are_refused(load: Load) -> None:
    stream = load("hope").stream(2)
    stream.feed(random_tokens(2, 3))
    held = stream.tensors()
    for model, odd, says in (
        (load("hope", torch.float32), held, r"another model: blocks\.0\.\w+ is torch\.float64"),
        (load("gated-delta"), held, r"another model: blocks\.0\.current"),
        (load("attention"), held, r"another model: no blocks\.0\.keys"),
        (load("hope"), {**held, "blocks.9.tail": held["lengths"]}, r"blocks\.9\.tail is odd"),
        (load("hope"), {**held, "lengths": torch.tensor([3])}, "another model"),
        (load("hope"), {"x": torch.zeros(1)}, "not the tensors of a stream"),
    ):
        with pytest.raises(UserError, match=says):
            model.stream_from(odd)


@pytest.mark.parametrize(
    ("mixer", "changed", "says"),
    [
        ("hope", {"blocks.0.position": [99, -3]}, r"blocks\.0 is not after lengths \[3, 3\]"),
        ("hope", {"lengths": [700, 3]}, r"not after lengths \[700, 3\]"),
        ("attention", {"lengths": [4, 3]}, r"not after lengths \[4, 3\]"),
        ("attention", {"lengths": [9, 3], "blocks.0.lengths": [9, 3]}, "not after lengths"),
        ("attention", {"lengths": [-1, 3]}, "one of its lengths is -1"),
    ],
    ids=str,
)
def test_tensors_that_do_not_go_together_are_refused(
    mixer: str, changed: dict[str, list[int]], says: str, load: Load
) -> None:
    model = load(mixer)
    stream = model.stream(2)
    stream.feed([[1, 2, 3], [4, 5, 6]])
    held = stream.tensors() | {name: torch.tensor(x) for name, x in changed.items()}
    with pytest.raises(UserError, match=says):
        model.stream_from(held)
    with pytest.raises(UserError, match="that has read 3 tokens have the states of its blocks"):
        model.stream_from({"lengths": stream.lengths})


@pytest.mark.parametrize("mixer", ["hope", "attention"])
def test_a_stream_that_was_broken_off_in_a_piece_says_so(
    mixer: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(mixer)
    tokens = random_tokens(2, 6)
    stream = model.stream(2)
    stream.feed(tokens[:, :4])
    kept = stream.clone()

    def broken_off(*_: Any) -> None:
        raise RuntimeError("no memory is left")

    for piece in (tokens[:, 4:5], tokens[:, 4:]):  # token by token, and at once
        stream = kept.clone()
        with monkeypatch.context() as patch:  # the first block has read it by then
            patch.setattr(model._decoder.blocks["1"].mixer, "one_token", lambda: broken_off)
            patch.setattr(model._decoder.blocks["1"].mixer, "forward", broken_off)
            with pytest.raises(RuntimeError, match="no memory"):
                stream.feed(piece)
        acts: list[Callable[[], object]] = [
            partial(stream.feed, piece),
            partial(stream.select, [0]),
            partial(stream.reset, [0]),
            stream.clone,
            stream.tensors,
        ]
        for act in acts:
            with pytest.raises(UserError, match=r"broken off .* go on from a clone\(\)"):
                act()
    assert far(kept.feed(tokens[:, 4:]), model.logits(tokens)[:, 4:]) < EXACT


@pytest.mark.parametrize("mixer", ["hope", "hope-pure", "gated-delta", "attention"])
def test_a_row_that_begins_anew_in_its_first_chunk_leaves_the_others(
    mixer: str, load: Load, recwarn: pytest.WarningsRecorder
) -> None:
    model = load(mixer)
    tokens = random_tokens(2, 12)
    stream = model.stream(2)
    stream.feed(tokens[:, :3])  # some memories of both rows are still one and the same
    stream.reset([0])
    found = stream.feed(torch.stack([tokens[0, :9], tokens[1, 3:]]))
    assert far(found[0], model.logits(tokens[:1, :9])[0]) < EXACT
    assert far(found[1], model.logits(tokens[1:])[0, 3:]) < EXACT
    assert not [w for w in recwarn if "expanded" in str(w.message)]


def test_a_choice_of_rows_is_not_copied_again_and_attention_holds_what_it_counts(
    load: Load,
) -> None:
    stream = load("attention").stream(2)
    stream.feed(random_tokens(2, 5))
    state = stream._states["0"]  # type: ignore[index]
    for x in (state.keys, state.values):
        assert x.untyped_storage().nbytes() == x.nbytes
    stream.feed([[1], [2]])
    fork = stream.select([1, 1])
    chosen = fork._states["0"].values  # type: ignore[index]
    stream.feed([[1], [2]])
    assert chosen.shape[2] > 7 and fork._one_token is stream._one_token
    fork.feed([[3], [4]])
    assert fork._states["0"].values is chosen  # type: ignore[index]


def test_a_stream_that_has_read_nothing_can_be_all_that_too(load: Load) -> None:
    model = load("hope")
    stream = model.stream_from(model.stream(3).select([0, 0]).tensors())
    stream.reset([1])
    assert stream.batch == 2 and stream.lengths.tolist() == [0, 0]
    assert bool(stream.feed([[3], [4]], [0, 0], last=True).isnan().all())
    tokens = random_tokens(2, 3)
    assert far(stream.feed(tokens), model.logits(tokens)) < EXACT


@pytest.mark.parametrize("lengths", [[1], [1, 3], [-1, 0], [0.5, 1.0], [[1, 1]], [True, False]])
def test_lengths_that_are_none_are_refused(lengths: Any, load: Load) -> None:
    stream = load("hope").stream(2)
    with pytest.raises(UserError, match="2 rows of 2 tokens; give 2 integers from 0 to 2"):
        stream.feed([[1, 2], [3, 4]], lengths)


@pytest.mark.parametrize("rows", [[], [2], [-1], [0.0], [[0]]])
def test_rows_that_are_not_there_are_refused(rows: Any, load: Load) -> None:
    for act in (load("hope").stream(2).select, load("hope").stream(2).reset):
        with pytest.raises(UserError, match="of a stream of 2; give some of 0 to 1"):
            act(rows)


def test_a_mixer_that_knows_of_no_rows_says_what_it_lacks(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("gated-delta")
    stream = model.stream(2)
    mixer = type(model._decoder.blocks["0"].mixer)
    plain = mixer.forward

    def old(self: Any, x: Tensor, state: Any = None, documents: Any = None) -> Any:
        y, state = plain(self, x, state[0] if state else None, documents)
        return y, (state,)

    monkeypatch.setattr(mixer, "forward", old)
    monkeypatch.delattr(mixer, "one_token")
    tokens = random_tokens(2, 8)
    pieces = torch.cat([stream.feed(piece) for piece in tokens.split([5, 1, 1, 1], 1)], 1)
    assert far(pieces, model.logits(tokens)) < EXACT
    with pytest.raises(UserError, match=r"MemoryMixer reads all rows alike.*add-a-mixer"):
        stream.feed(tokens, [1, 8])
    with pytest.raises(UserError, match=r"module\.State, and that of MemoryMixer is a tuple"):
        stream.select([0])
