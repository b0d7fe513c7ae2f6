"""A prompt with needles, as long as it may be; and a reader that solves any of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from nlscale.data.needles.kinds import FORMS, KINDS, NOISE, Form, Kind
from nlscale.data.needles.words import keys, numbers, uuids, variables
from nlscale.errors import UserError

Count = Callable[[str], int]
"""Of the tokens of a text."""
_ENDLESS = sys.maxsize
"""Units of a haystack that is made as it is wanted."""
DEPTHS = 40
"""Points from the start of the haystack to its end, at which needles can be."""


@dataclass(frozen=True)
class Prompt:
    """A question with its answer."""

    text: str
    answer: str
    """What follows `text`: a space, the references with commas between them, a full stop."""
    references: tuple[str, ...]
    """Of which as many as can be are to be found in what a model says."""
    depths: tuple[float, ...]
    """Where in the haystack each of them was, from 0, its start, to 1."""


@dataclass(frozen=True)
class _Needles:
    """What is hidden and asked for, without the haystack."""

    sentences: list[str]
    depths: list[float]
    """Of the sentences."""
    references: list[str]
    at: list[float]
    """Of the references."""
    before: str
    question: str

    @property
    def answer(self) -> str:
        return _answer(self.references)


def prompt(
    kind: str, form: str, rng: Generator, depth: float, length: int, count: Count, haystack: str
) -> Prompt:
    """A prompt that takes, with its answer, at most so many tokens, and next to no fewer.

    Args:
        kind: of `KINDS`.
        form: of `FORMS`.
        rng: of which all random numbers are taken.
        depth: of the first reference, from 0 to 1; the others are anywhere.
        length: tokens, those of the answer among them.
        count: of tokens.
        haystack: text, for the kinds that have it as theirs; it is begun at any place, and read
            round. Empty: the sentences of `NOISE` stand for it.

    Raises:
        UserError: what is asked takes more tokens than that without any haystack, or the prompt
            has room for more than the whole of the text.
    """
    asked, worded = KINDS[kind], FORMS[form]
    needles = _needles(asked, worded, rng, depth)
    most = _ENDLESS
    if asked.haystack == "needles":
        build = _among_needles(asked, worded, needles, int(rng.integers(1 << 62)))
        each = count(needles.sentences[0])
    else:
        text = haystack if asked.haystack == "text" and haystack else ""
        build, each = _in_text(needles, text, float(rng.random())), 1
        most = len(text) or most
    room = length - count(needles.answer)
    size = _most(lambda size: count(build(size)), room, each, most)
    text = build(size)
    if (taken := count(text)) > room:
        raise UserError(
            f"needles of kind {kind} in the {form} form take {taken + length - room} tokens "
            f"without any haystack, and the context has {length}; make it longer, or ask other "
            f"kinds, or in the short form"
        )
    if size == most and taken < room:  # one character more might have fitted
        raise UserError(
            f"the haystack has {most:,} characters of text, and a context of {length:,} tokens has "
            f"room for {room - taken:,} tokens more; give more text with --haystack, or shorter "
            f"lengths"
        )
    return Prompt(text, needles.answer, tuple(needles.references), tuple(needles.at))


def smallest(kind: str, form: str, count: Count) -> int:
    """Tokens of a prompt of a kind and form, and of its answer, without any haystack."""
    needles = _needles(KINDS[kind], FORMS[form], np.random.default_rng(0), 0.0)
    return count(_in_text(needles, "", 0.0)(0)) + count(needles.answer)


def _needles(kind: Kind, form: Form, rng: Generator, depth: float) -> _Needles:
    return (_chain if kind.hops else _values)(kind, form, rng, depth)


def _values(kind: Kind, form: Form, rng: Generator, depth: float) -> _Needles:
    names = (uuids if kind.uuid_keys else keys)(rng, kind.keys)
    pairs = [name for name in names for _ in range(kind.values)]
    values = (uuids if kind.uuid_values else numbers)(rng, len(pairs))
    depths = _depths(rng, depth, len(pairs))
    if kind.values > 1:  # in the order in which they are told
        depths.sort()
    wanted, what = kind.asked * kind.values, "uuid" if kind.uuid_values else "number"
    worded = {"what": what, "keys": ", ".join(names[: kind.asked])}
    return _Needles(
        [form.needle.format(key=k, value=v, what=what) for k, v in zip(pairs, values, strict=True)],
        depths,
        values[:wanted],
        depths[:wanted],
        form.before[wanted > 1].format(**worded),
        form.question[wanted > 1].format(**worded),
    )


def _chain(kind: Kind, form: Form, rng: Generator, depth: float) -> _Needles:
    count = kind.hops + 1
    while len(set(names := variables(rng, count))) < count:
        pass
    (value,) = numbers(rng, 1, digits=5)
    depths = sorted(_depths(rng, depth, count))  # each after what it refers to
    sentences = [form.chain[0].format(name=names[0], value=value)] + [
        form.chain[1].format(name=name, value=other) for other, name in pairwise(names)
    ]
    question = form.chain_question.format(value=value, count=count)
    return _Needles(sentences, depths, names, depths, form.chain_before, question)


def _depths(rng: Generator, first: float, count: int) -> list[float]:
    return [first, *(rng.integers(0, DEPTHS, count - 1) / (DEPTHS - 1)).tolist()]


def _in_text(needles: _Needles, text: str, offset: float) -> Callable[[int], str]:
    """The prompt with so many characters of haystack, of a text at most as many as it has."""
    noise = not text

    def build(size: int) -> str:
        if noise:
            whole = (NOISE * (size // len(NOISE) + 1))[:size]
        else:
            first = int(offset * len(text))
            whole = (text[first : first + size] + text)[:size]
        places = [_before(whole, int(depth * size), noise) for depth in needles.depths]
        order = sorted(range(len(places)), key=lambda i: (places[i], i))
        pieces, last = [needles.before], 0
        for i in order:
            pieces += [whole[last : places[i]], needles.sentences[i], " "]
            last = places[i]
        return "".join([*pieces, whole[last:], needles.question])

    return build


def _before(text: str, place: int, noise: bool) -> int:
    """Where a needle goes: after the last space, of noise the last sentence, before a place."""
    if noise:
        return text.rfind(". ", 0, place) + 2 if ". " in text[:place] else 0
    return max(text.rfind(space, 0, place) for space in " \n") + 1


def _among_needles(kind: Kind, form: Form, needles: _Needles, seed: int) -> Callable[[int], str]:
    """The prompt among so many others like its needle, in a line each."""
    made: list[str] = []
    rng = np.random.default_rng(seed)
    what = "uuid" if kind.uuid_values else "number"
    own = set(needles.sentences)

    def build(size: int) -> str:
        while len(made) < size:
            # A few at a time, so that they do not depend on how many are asked for.
            names = uuids(rng, 64) if kind.uuid_keys else keys(rng, 64)
            values = (uuids if kind.uuid_values else numbers)(rng, 64)
            for name, value in zip(names, values, strict=True):
                begins = form.needle.format(key=name, value="", what=what).rstrip(".")
                if not any(sentence.startswith(begins) for sentence in own):
                    made.append(form.needle.format(key=name, value=value, what=what))
        lines = made[:size]
        for depth, sentence in zip(needles.depths, needles.sentences, strict=True):
            lines.insert(round(depth * len(lines)), sentence)
        return needles.before + "\n".join(lines) + needles.question

    return build


def _most(tokens: Callable[[int], int], room: int, each: int, most: int) -> int:
    """The largest size, up to `most`, of at most so many tokens, about `each` a unit; 0 where there
    is none.

    Tokens are nearly in proportion to the size, so that few prompts are made to find it.
    """
    low, high = 0, min(most, max(1, room // each))
    at_low, at_high = tokens(low), tokens(high)
    if at_low > room:
        return 0
    while at_high <= room:
        if high == most:
            return most
        low, at_low, high = high, at_high, min(most, 2 * high)
        at_high = tokens(high)
    halves = False
    while high - low > 1:
        share = 0.5 if halves else (room - at_low) / (at_high - at_low)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        here = tokens(middle)
        if here <= room:
            low, at_low = middle, here
        else:
            high, at_high = middle, here
        halves = not halves
    return low


def solve(text: str) -> tuple[str, str]:
    """The answer to the prompt in a text, found by reading it; and what the text has of it.

    Raises:
        ValueError: it ends with no question, nor with an answer that has begun.
    """
    for form in FORMS.values():
        asked, rest = _last(form.chain_question, text)
        if asked is not None:
            return _answer(_variables(form, text[: asked.start()], asked["value"])), rest
        for question in form.question:
            asked, rest = _last(question, text)
            if asked is not None:
                told = list(_pattern(form.needle).finditer(text, 0, asked.start() + 1))
                keys_asked = asked["keys"].split(", ")
                return _answer(
                    [m["value"] for k in keys_asked for m in told if m["key"] == k]
                ), rest
    raise ValueError("no question")


def _variables(form: Form, text: str, value: str) -> list[str]:
    """All that have a value, in the order in which they are told."""
    names: list[str] = []
    told = [match for wording in form.chain for match in _pattern(wording).finditer(text)]
    for match in sorted(told, key=re.Match.start):
        if match["value"] in (value, *names) and match["name"] not in names:
            names.append(match["name"])
    return names


def _answer(values: Sequence[str]) -> str:
    return f" {', '.join(values)}."


_WORD = r"[\w-]+"


def _pattern(wording: str) -> re.Pattern[str]:
    """A wording with groups for what is filled in, each once."""
    pattern = re.escape(wording).replace(r"\{", "{").replace(r"\}", "}")
    for name, inside in (
        ("key", _WORD), ("value", _WORD), ("name", _WORD), ("what", "[a-z]+?"),
        ("keys", rf"{_WORD}(?:, {_WORD})*"), ("count", "[0-9]+"),
    ):  # fmt: skip
        pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{inside})", 1)
        pattern = pattern.replace(f"{{{name}}}", f"(?P={name})")
    return re.compile(pattern)


def _last(question: str, text: str) -> tuple[re.Match[str] | None, str]:
    """The question that a text ends with, and what is there of an answer."""
    found = list(_pattern(question).finditer(text))
    rest = text[found[-1].end() :] if found else ""
    if not found or not re.fullmatch(r"(?: [\w, -]*)?", rest):
        return None, ""
    return found[-1], rest
