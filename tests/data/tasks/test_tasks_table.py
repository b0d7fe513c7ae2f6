"""Tasks by name: what is typed, and what is said of mistakes."""

from __future__ import annotations

import pytest

from nlscale.data.tasks.table import TASKS, listing, task_of
from nlscale.errors import UserError


def test_what_is_not_given_has_its_default() -> None:
    task = task_of("task:mqar(length = 64, pairs=8,)")
    assert str(task) == "mqar(vocabulary=64, length=64, pairs=8, forgetting=false)"
    assert task_of("mqar") == task_of("mqar()") == TASKS["mqar"]()
    assert str(task_of("mad-noisy-recall(share=0.5)")).endswith("noises=16, share=0.5)")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_read_from_its_own_text(name: str) -> None:
    assert task_of(str(TASKS[name]())) == TASKS[name]()


def test_the_listing_can_be_typed() -> None:
    assert [str(task_of(text)) for text, _ in listing()] == [str(kind()) for kind in TASKS.values()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mqr", "no task is called 'mqr'; did you mean 'mqar'?"),
        ("", "no task is called ''; there are mqar, parity"),
        ("mqar(pairs=4", "is not written as NAME"),
        ("mqar(pair=4)", "task mqar has no argument 'pair'; did you mean 'pairs'?"),
        ("mqar(4)", "task mqar has no argument '4'; there are vocabulary, length"),
        ("mqar(pairs)", "pairs has no value; write pairs=VALUE"),
        ("mqar(pairs=4, pairs=5)", "pairs is given twice"),
        ("mqar(pairs=four)", "pairs=four is not a whole number"),
        ("mqar(pairs=4.0)", "pairs=4.0 is not a whole number; write 4"),
        ("mqar(forgetting=maybe)", "forgetting=maybe is not true or false"),
        ("mqar(pairs=0)", "task mqar: pairs is 0; it must be from 1 to"),
        ("mad-noisy-recall(share=.nan)", "share is nan; it must be"),
        ("mqar(vocabulary=8)", "it has 3 keys for 4 that differ; set vocabulary to 10"),
        ("mqar(length=15)", "4 pairs and their 4 queries take 16 tokens; set length to 16"),
        ("parity(shortest=20)", "shortest is above longest"),
        ("abab(longest=7, shortest=5)", "lengths are multiples of 4; set longest to 8"),
        ("parity(length=17)", "set length to 18 or more"),
        ("mad-recall(length=15)", "set length to 16 or more"),
        ("mad-noisy-recall(share=0.9)", "raise length or lower share"),
        ("mad-fuzzy-recall(length=40)", "set length to 48 or more"),
        ("mad-memorise(length=256)", "set vocabulary to 258 or more, or length to 254 or less"),
        ("mad-selective-copy(length=20)", "take 33 tokens"),
        ("needle(needles=50)", "50 needles and the question take 306 tokens"),
        ("needle(needles=17)", "set keys to 17"),
        ("text-needle(kinds=s1+mk9)", "no kind of needle is called 'mk9'"),
        ("text-needle(form=long)", "no form is called 'long'; there are short, ruler"),
        ("text-needle(length=100)", "needles of kind mq take 187 tokens without any haystack"),
        ("text-needle(shortest=513)", "shortest is above length; lower it"),
        ("babi-3(facts=5)", "3 questions need 3 facts each; set facts to 9"),
    ],
)
def test_a_mistake_is_one_line_with_its_fix(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        task_of(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_errors_advise_is_taken() -> None:
    for text in (
        "mqar(vocabulary=10)", "mqar(length=16)", "abab(longest=8, shortest=5)",
        "parity(length=18)", "mad-recall(length=16)", "mad-fuzzy-recall(length=48)",
        "mad-memorise(length=256, vocabulary=258)", "mad-memorise(length=254)",
        "mad-selective-copy(length=33)", "needle(needles=17, keys=17)", "babi-3(facts=9)",
    ):  # fmt: skip
        task_of(text)
