"""What words mean: against other ways of finding it out."""

from __future__ import annotations

import re
from itertools import product

import pytest

from nlscale.data.tasks.groups import S3, S5, Modular
from nlscale.data.tasks.table import TASKS
from nlscale.data.tasks.words import Words


def balanced(word: str) -> bool:
    """Each kind of bracket, with those of the other left out, by taking out pairs."""
    for kind in ("()", "[]"):
        own = "".join(letter for letter in word if letter in kind)
        while kind in own:
            own = own.replace(kind, "")
        if own:
            return False
    return True


def blocks(letters: str, word: str) -> bool:
    match = re.fullmatch("".join(f"({letter}+)" for letter in letters), word)
    return match is not None and len({len(block) for block in match.groups()}) == 1


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("aa", lambda word: bool(re.fullmatch("(aa)*", word))),
        ("abab", lambda word: bool(re.fullmatch("(abab)*", word))),
        ("anbn", lambda word: blocks("ab", word)),
        ("anbncn", lambda word: blocks("abc", word)),
        ("shuffle2", balanced),
        ("parity", lambda word: word.count("1") % 2 == 1),
    ],
)
def test_a_language_is_what_it_is_called(name: str, belongs) -> None:
    task = TASKS[name]()
    assert isinstance(task, Words)
    members = 0
    for length in range(1, 7):
        for word in product(range(len(task.alphabet)), repeat=length):
            text = "".join(task.alphabet[symbol] for symbol in word)
            assert bool(task.read(list(word))) == belongs(text), text
            members += belongs(text)
    assert members >= 1


def test_permutations_multiply_as_functions_do() -> None:
    task = S3()
    swap, turn = task.alphabet.index("102"), task.alphabet.index("120")
    assert task.alphabet[task.read([swap, swap])] == "012"
    assert task.alphabet[task.read([turn, turn, turn])] == "012"
    assert task.alphabet[task.read([swap, turn])] == "021"  # x -> swap(turn(x))
    assert task.alphabet[task.read([turn, swap])] == "210"
    assert len(S5().alphabet) == 120


def test_sums_are_modulo_the_number() -> None:
    assert Modular(modulus=5).read([4, 4, 1]) == 4
