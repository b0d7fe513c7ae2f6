"""Every task: what an example is, a solver that is always right, and a guesser at chance."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from nlscale.data.tasks.examples import Split, example, held_out
from nlscale.data.tasks.table import FAMILIES, TASKS, task_of
from nlscale.data.tasks.task import Example, Task
from nlscale.errors import UserError

EXAMPLES = 200
NAMES = [
    *TASKS,
    "mqar(forgetting=true, pairs=6)",
    "needle(needles=4, length=64)",
    "text-needle(kinds=s1+s3+mk1+mk2+mv+vt, shortest=48, length=300, form=short)",
]
every_task = pytest.mark.parametrize("name", NAMES)


@cache
def drawn(name: str) -> list[Example]:
    return [example(task_of(name), Split.train, 7, i) for i in range(EXAMPLES)]


def targets(name: str) -> list[tuple[np.ndarray, int]]:
    """Each counted target with all that stands before it."""
    return [
        (ids[:place], int(ids[place]))
        for ids, mask in drawn(name)
        for place in np.flatnonzero(mask)
    ]


@every_task
def test_examples_are_of_one_length_and_their_targets_are_answers(name: str) -> None:
    task = task_of(name)
    assert len(set(task.symbols)) == len(task.symbols) and task.symbols[-1] == "_"
    for ids, mask in drawn(name):
        assert ids.shape == mask.shape == (task.length,)
        assert ids.dtype == np.int64 and mask.dtype == np.bool_
        assert ids.min() >= 0 and ids.max() <= task.padding
        assert mask.any() and not mask[0]
        assert set(ids[mask]) <= set(task.answers)


@every_task
def test_the_solver_is_always_right(name: str) -> None:
    task = task_of(name)
    wrong = [(ids, answer) for ids, answer in targets(name) if task.solve(ids) != answer]
    assert not wrong, " ".join(task.symbols[i] for i in wrong[0][0])


@every_task
def test_a_guess_is_right_by_chance(name: str) -> None:
    task, asked = task_of(name), targets(name)
    guesses = np.random.default_rng(0).choice(task.answers, len(asked))
    right = sum(int(guess) == answer for guess, (_, answer) in zip(guesses, asked, strict=True))
    assert likely(right, len(asked), task.chance)


def likely(right: int, of: int, chance: float) -> bool:
    """Whether either tail of the binomial distribution from there on holds at least 1e-6."""
    n = np.arange(of + 1)
    factorial = np.cumsum(np.log(np.maximum(n, 1)))
    log_ways = factorial[of] - factorial - factorial[::-1]
    weights = np.exp(log_ways + n * math.log(chance) + n[::-1] * math.log1p(-chance))
    return min(weights[: right + 1].sum(), weights[right:].sum()) >= 1e-6


def test_the_bound_of_a_guess_is_one() -> None:
    assert likely(500, 1000, 0.5) and not likely(580, 1000, 0.5) and not likely(0, 100, 0.2)


@pytest.mark.parametrize("name", ["parity", "modular", "s3", "abab", "anbn", "anbncn", "shuffle2"])
def test_no_answer_is_commoner_than_chance(name: str) -> None:
    task, answers = task_of(name), [answer for _, answer in targets(name)]
    assert all(likely(answers.count(one), len(answers), task.chance) for one in task.answers)


@every_task
def test_an_example_follows_from_its_number_alone(name: str) -> None:
    task = task_of(name)
    for number in (5, 3):
        again = example(task_of(str(task)), Split.train, 7, number)
        assert all(map(np.array_equal, again, drawn(name)[number]))
    others = [(Split.train, 8, 5), (Split.validation, 7, 5), (Split.fresh, 7, 5)]
    assert not any(np.array_equal(example(task, *o).ids, drawn(name)[5].ids) for o in others)


@every_task
def test_no_split_draws_what_another_trains_on(name: str) -> None:
    assert not any(held_out(ids) for ids, _ in drawn(name))
    task = task_of(name)
    for split in (Split.validation, Split.fresh):
        assert all(held_out(example(task, split, seed, 0).ids) for seed in range(3))


def test_few_examples_are_drawn_again_and_again_and_still_held_out() -> None:
    few = task_of("aa(longest=3, length=9)")
    train, validation = (
        {example(few, split, 0, i).ids.tobytes() for i in range(EXAMPLES)}
        for split in (Split.train, Split.validation)
    )
    assert 1 <= len(validation) < len(train) < EXAMPLES / 2
    assert not train & validation
    with pytest.raises(UserError, match="it has too few examples to hold some out"):
        for split in (Split.train, Split.validation):
            example(task_of("aa(longest=1, length=3)"), split, 0, 0)


@every_task
def test_longer_examples_are_as_long_as_is_said_and_solved(name: str) -> None:
    task = task_of(name)
    for factor in (2, 4):
        longer = task.longer(factor)
        assert type(longer) is type(task) and longer.length == factor * task.length
        assert longer.symbols == task.symbols and longer.answers == task.answers
        ids, mask = example(longer, Split.fresh, 0, 0)
        place = int(np.flatnonzero(mask)[-1])
        assert longer.solve(ids[:place]) == ids[place]


def test_words_of_longer_tasks_are_longer_than_those_of_training() -> None:
    longer = task_of("parity(longest=8, length=32)").longer(2)
    ends = np.flatnonzero(example(longer, Split.fresh, 0, 0).mask)
    sizes = np.diff(np.concatenate([[-1], ends])) - 2  # without the question and the answer
    assert all(8 < size <= 16 for size in sizes)


def test_forgetting_asks_for_the_last_value() -> None:
    task = task_of("mqar(forgetting=true, pairs=6)")
    for ids, mask in drawn("mqar(forgetting=true, pairs=6)"):
        given = ids[:12].reshape(6, 2).tolist()
        assert len({key for key, _ in given}) == 3
        places = np.flatnonzero(mask)
        assert dict(given) == {int(ids[p - 1]): int(ids[p]) for p in places} and len(places) == 3
    assert task.longer(4).length == 4 * task.length


def test_every_task_is_of_a_family() -> None:
    assert list(FAMILIES) == ["recall", "automata", "mad", "needle", "babi"]
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(TASKS)
    assert all(isinstance(kind(), Task) for kind in TASKS.values())
