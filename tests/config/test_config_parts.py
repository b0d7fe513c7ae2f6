"""Which level each part of the model belongs to, and what of it is refused."""

from __future__ import annotations

import re

import pytest

from nlscale.config import recipe
from nlscale.config.parts import Parts, parts_of, parts_of_saved
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError

TIED = "model.tie_embeddings=true"


def load(levels: str, *overrides: str) -> Config:
    return recipe.load(None, ["data.dir=none", f"levels={levels}", *overrides]).config


@pytest.mark.parametrize(
    ("levels", "parts"),
    [
        ("[1]", Parts((0,), 0, 0, 0, None)),
        ("[1,4,16]", Parts((0, 1, 2), 0, 0, 0, None)),
        ("[1,{period: 4, parts: [cms, mixer]}]", Parts((0, 1), 1, 0, 0, None)),
        # what no level names belongs to the first, whatever that names
        ("[{parts: [cms]},{period: 4, parts: [mixer, cms]}]", Parts((0, 1), 1, 0, 0, None)),
        ("[{parts: []},{period: 4}]", Parts((1,), 0, 0, 0, None)),
        (
            "[{parts: [norms]},{period: 2, parts: [head]},"
            "{period: 4, parts: [cms, mixer, embedding]}]",
            Parts((2,), 2, 2, 1, 0),
        ),
    ],
)
def test_a_level_has_what_it_names(levels: str, parts: Parts) -> None:
    config = load(levels)
    assert parts_of(config) == parts
    assert parts_of_saved(recipe.to_plain(config)) == parts


def test_a_tied_head_is_where_the_embedding_is() -> None:
    for named in ("[embedding]", "[embedding, head]"):
        parts = parts_of(load(f"[1,{{period: 4, parts: {named}}}]", TIED))
        assert (parts.embedding, parts.head) == (1, 1)
        assert [part.value for part in parts.of_level(1)] == ["embedding", "head"]


def test_parts_lie_at_depths() -> None:
    parts = parts_of(
        load("[{parts: [mixer, cms]},{parts: [embedding]},{parts: [head]},{parts: [norms]}]")
    )
    assert [parts.depths(level, 5) for level in range(4)] == [[*range(5)], [0], [4], [*range(5)]]
    both = parts_of(load("[1,{parts: [head, embedding]}]"))
    assert both.depths(1, 5) == [0, 4] and both.depths(1, 1) == [0]


def test_what_was_saved_before_there_were_parts_has_them_as_always() -> None:
    saved = recipe.to_plain(load("[1,4]"))
    for level in saved["levels"]["spectrum"]:
        del level["parts"]
    del saved["model"]["tie_embeddings"]
    assert parts_of_saved(saved) == Parts((0, 1), 0, 0, 0, None)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (
            "[{name: a, parts: [cms, mixer]},{name: b, parts: [mixer]}]",
            "levels.spectrum.1.parts: mixer is of level 'a' already (levels.spectrum.0.parts); "
            "name it at one of them",
        ),
        ("[1,{parts: [cms, head, head]}]", "levels.spectrum.1.parts names head twice"),
        (
            "[{parts: [mixer]},{parts: [head]}]",
            "levels.spectrum.1.parts leaves out cms, and so do the parts of all levels",
        ),
        ("[1,{name: b, parts: []}]", "levels.spectrum.1.parts leaves level 'b' nothing"),
        (
            "[{name: a, parts: []},{parts: [cms, mixer, embedding, head]}]",
            "levels.spectrum.0.parts leaves level 'a' nothing of the model",
        ),
        (
            "[1,{parts: [mixer], hidden: 64}]",
            "levels.spectrum.1.hidden is 64, and the level has no MLP: its parts leave out cms",
        ),
        ("[1,{parts: [attention]}]", "levels.spectrum.1.parts.0: 'attention' is not one of cms"),
        ("[1,{parts: mixer}]", "levels.spectrum.1.parts is 'mixer'; it must be a list such as"),
    ],
)
def test_what_goes_wrong_is_one_line_that_names_the_key(levels: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load(levels)


def test_a_tied_head_apart_from_the_embedding_is_refused() -> None:
    levels = "[{name: a},{name: b, period: 4, parts: [cms, head]}]"
    load(levels)
    with pytest.raises(UserError, match=r"^levels\.spectrum\.1\.parts names head.*of level 'a'"):
        load(levels, TIED)
