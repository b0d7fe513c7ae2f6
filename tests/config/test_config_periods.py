"""Periods that change in a run: against windows that are laid one after the other, step by step."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from nlscale.checkpoint.same_run import stable_end
from nlscale.config import recipe
from nlscale.config.curriculum import curriculum, tokens_until
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.notes import period_notes
from nlscale.levels.spectrum import levels_of, planned_updates, sync_group
from nlscale.plan.traffic import due_steps


def load(*overrides: str) -> Config:
    return recipe.load(None, ["data.dir=none", *overrides]).config


def drawn(seed: int) -> tuple[Config, dict]:
    """A run whose periods change, and what was drawn."""
    draw = random.Random(seed)
    steps = draw.choice([1, 7, 40, 100, 333])
    periods = sorted(
        draw.choice([1, 2, 3, 4, 5, 8, 12, 16, 31, 64]) for _ in range(draw.randint(1, 3))
    )
    grows = draw.choice([0, draw.randint(0, steps), steps // 3])
    cools = draw.choice([None, draw.randint(grows, steps - 1)] if grows < steps else [None])
    batches = {0: draw.choice([2, 4, 8])}
    critical: dict[int, int] = {}
    for found, values in ((batches, [2, 4, 8, 16]), (critical, [10, 100, 1000, 3000])):
        if draw.random() < 0.5:
            places = sorted({0, *(draw.randrange(steps) for _ in range(3))})
            found.update({place: draw.choice(values) for place in places})
    share = draw.choice([0.25, 0.35, 1.0])
    sizes = [f"{{from: {place} steps, size: {size}}}" for place, size in batches.items()]
    stated = [f"{{from: {p} steps, tokens: {n} tokens}}" for p, n in critical.items()]
    config = load(
        f"levels=[{','.join(map(str, periods))}]",
        f"levels.stagger={draw.choice(['true', 'false'])}",
        f"model.layers={draw.choice([1, 3, 5, 12])}",
        f"train.steps={steps}",
        f"train.global_batch=[{','.join(sizes)}]",
        "data.sequence_length=7",
        f"levels.period_warmup.steps={grows} steps",
        f"levels.period_warmup.cooldown={'null' if cools is None else f'{cools} steps'}",
        f"levels.period_warmup.critical_batch=[{','.join(stated)}]",
        f"levels.period_warmup.share={share}",
    )
    return config, {
        "periods": periods, "grows": grows, "cools": cools, "batches": batches,
        "critical": critical, "share": share,
    }  # fmt: skip


def cap_after(step: int, steps: int, o: dict) -> int:
    """How long a period may be in a window that begins after a step, by the words of the keys."""
    longest = max(o["periods"])
    ladder = [2**i for i in range(20) if 2**i < longest]  # 1, 2, 4, ... below the longest
    cap = longest
    if step < o["grows"] and ladder:
        cap = ladder[int(Fraction(step, o["grows"]) * len(ladder))]
    if o["cools"] is not None and step >= o["cools"] and ladder:
        falls = list(reversed(ladder))
        past = Fraction(step - o["cools"], steps - o["cools"])
        cap = min(cap, falls[min(len(falls) - 1, int(past * len(falls)))])
    if o["critical"]:
        tokens = [n for place, n in sorted(o["critical"].items()) if place <= step][-1]
        batch = [n for place, n in sorted(o["batches"].items()) if place <= step][-1]
        if longest * batch * 7 > o["share"] * tokens:
            cap = min(cap, max([1, *(c for c in ladder if c * batch * 7 <= o["share"] * tokens)]))
    return cap


@pytest.mark.parametrize("seed", range(60))
def test_every_step_is_in_one_window_and_windows_change_at_their_ends(seed: int) -> None:
    config, o = drawn(seed)
    steps, layers, stages = config.train.steps, config.model.layers, curriculum(config)

    def until(step: int) -> int:
        return tokens_until(stages, step)

    for level in levels_of(config):
        most = 0
        for depth in range(layers):
            group = sync_group(level, depth, layers, config.levels.stagger)
            ends: list[int] = []
            began, full = 0, {}
            while began < steps + 70:
                period = min(level.period, cap_after(min(began, steps - 1), steps, o))
                phase = group.phase * period // level.period
                end = next(t for t in range(began + 1, began + 99) if (t - phase) % period == 0)
                assert end - began <= period <= level.period
                for step in range(began + 1, end + 1):
                    full[step] = (period, until(end) - until(end - period))
                ends.append(end)
                began = end
            assert [t for t in range(1, steps + 1) if group.due(t)] == [
                t for t in ends if t <= steps
            ]
            assert due_steps(group, steps).tolist() == [t for t in ends if t <= steps]
            assert [group.period_at(t) for t in range(1, steps + 1)] == [
                full[t][0] for t in range(1, steps + 1)
            ]
            for step in random.Random(seed).sample(range(steps), min(5, steps)):
                assert group.window_tokens(step, until) == full[step + 1][1]
                assert group.due_until(step) == sum(t <= step for t in ends)
            # a window that is not full at the end of the run is applied as well
            made = sum(t < steps for t in ends) + 1
            assert group.updates(steps) == made
            most = max(most, made)
        assert planned_updates(config, level) == most


def test_a_phase_is_that_of_the_depth_at_every_power_of_two() -> None:
    config = load("levels=[1,64]", "model.layers=24", "levels.period_warmup.steps=60 steps")
    slow = levels_of(config)[1]
    for depth in range(24):
        for own in sync_group(slow, depth, 24, stagger=True).stretches:
            assert own.phase == depth * own.period // 24


def test_without_its_keys_nothing_changes() -> None:
    levels = levels_of(load("levels=[1,4,16]"))
    assert all(level.changes is None for level in levels) and period_notes(levels) == []


def test_levels_grow_together_until_each_has_its_own_period() -> None:
    config = load("levels=[1,4,12]", "train.steps=1000", "levels.period_warmup.steps=8%",
                  "levels.period_warmup.cooldown=90%")  # fmt: skip
    assert period_notes(levels_of(config)) == [
        "the period of level 'level1' is 1, 2 from step 21, 4 from step 41, 2 from step 951, "
        "1 from step 976",
        "the period of level 'level2' is 1, 2 from step 21, 4 from step 41, 8 from step 61, "
        "12 from step 81, 8 from step 901, 4 from step 926, 2 from step 951, 1 from step 976",
    ]


def test_a_warm_up_may_be_longer_than_the_run() -> None:
    config = load("levels=[1,4]", "train.steps=60", "levels.period_warmup.steps=100 steps")
    (line,) = period_notes(levels_of(config))
    assert line.endswith("is 1, 2 from step 51")


def test_a_period_in_tokens_grows_in_steps() -> None:
    config = load("levels=[1, 64k tokens]", "train.global_batch=4", "train.steps=100",
                  "levels.period_warmup.steps=20 steps")  # fmt: skip
    (_, slow) = levels_of(config)
    assert slow.period == 16 and [slow.period_at(s) for s in (1, 6, 11, 16, 21)] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["steps=soon"], r"levels\.period_warmup\.steps: 'soon' is not a place in a run"),
        (["cooldown=100%"], r"cooldown: '100%' is not before the end of a run of 100 steps"),
        (["steps=50%", "cooldown=40%"], r"cooldown: '40%' is after 40 of 100 steps.*grow for 50"),
        (["critical_batch=[{from: 5%, tokens: 1k tokens}]"], r"no entry begins with the run"),
        (["critical_batch=[{from: 0, tokens: 9 steps}]"], r"batch\.0\.tokens: '9 steps' is"),
        (["critical_batch=[{from: 0}]"], r"critical_batch\.0\.tokens is not set"),
        (["share=0"], r"levels\.period_warmup\.share is 0\.0; it must be above 0"),
    ],
)  # fmt: skip
def test_what_is_no_warm_up_is_refused_in_a_line(overrides: list[str], said: str) -> None:
    keys = [f"levels.period_warmup.{key}" for key in overrides]
    with pytest.raises(UserError, match=said) as refused:
        load("levels=[1,4]", "train.steps=100", *keys)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "last"),
    [
        ([], 800),
        (["steps=30 steps"], 800),
        (["steps=3%"], 0),
        (["cooldown=600 steps"], 600),
        (["cooldown=70%"], 700),
        (["critical_batch=[{from: 0, tokens: 9 tokens}, {from: 20%, tokens: 90 tokens}]"], 200),
    ],
)
def test_a_longer_run_shares_the_steps_before_a_share_of_the_run_counts(
    keys: list[str], last: int
) -> None:
    overrides = ["levels=[1,4]", "train.steps=1000", "optimizer.schedule=wsd"]
    overrides += [f"levels.period_warmup.{key}" for key in keys]
    assert stable_end(load(*overrides), [1000, 1500]) == last
