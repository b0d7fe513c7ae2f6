"""Levels: periods, phases and which sync groups are due."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import pytest

from nlscale.config.units import Period
from nlscale.config.vocabulary import LevelConfig, LevelsConfig, PeriodRule
from nlscale.errors import UserError
from nlscale.levels.spectrum import Level, SyncGroup, phase, spectrum, sync_group


def config_of(*periods: str, **other: object) -> LevelsConfig:
    entries = [LevelConfig(name=f"level{i}", period=p) for i, p in enumerate(periods)]
    return LevelsConfig(spectrum=entries, **other)  # type: ignore[arg-type]


def level_of(period: int) -> Level:
    return spectrum(config_of(str(period)), tokens_per_step=1)[0]


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 12, 48])
@pytest.mark.parametrize("period", [1, 2, 4, 5, 16, 64, 1000])
def test_phases_are_within_the_period_and_spread_evenly(period: int, layers: int) -> None:
    phases = [phase(level_of(period), depth, layers, stagger=True) for depth in range(layers)]
    assert all(0 <= p < period for p in phases)
    # gaps on the circle of the period: as equal as whole steps allow
    ordered = [*sorted(phases), min(phases) + period]
    gaps = [b - a for a, b in itertools.pairwise(ordered)]
    assert max(gaps) <= -(-period // layers)
    assert min(gaps) >= period // layers
    # and no phase is used more than one block more often than another
    counts = [phases.count(p) for p in set(phases)]
    assert max(counts) <= -(-layers // period)


def test_without_staggering_all_blocks_update_together() -> None:
    level = level_of(16)
    assert {sync_group(level, depth, 12, stagger=False) for depth in range(12)} == {
        SyncGroup(level=0, phase=0, period=16)
    }


def test_a_phase_depends_on_depth_and_period_alone() -> None:
    slow = spectrum(config_of("1", "8", "16"), tokens_per_step=64)[2]
    alone = level_of(16)
    for depth in range(12):
        assert phase(slow, depth, 12, True) == phase(alone, depth, 12, True)


@pytest.mark.parametrize("seed", range(3))
def test_due_and_updates_agree_with_counting(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        period = draw.randint(1, 40)
        group = SyncGroup(0, draw.randrange(period), period)
        steps = draw.randint(1, 130)
        updates, pending = 0, 0
        for step in range(1, steps + 1):
            pending += 1
            due = step % period == group.phase % period
            assert group.due(step) == due
            if due:
                assert pending <= period
                updates, pending = updates + 1, 0
        assert group.updates(steps) == updates + (pending > 0), (group, steps)


def test_every_window_but_the_first_is_a_whole_period() -> None:
    group = SyncGroup(0, 3, 8)
    due = [step for step in range(1, 30) if group.due(step)]
    assert due == [3, 11, 19, 27]


def traffic(periods: Iterable[int], layers: int, stagger: bool) -> list[float]:
    """Share of plain data parallelism's traffic at each step of the longest period."""
    levels = spectrum(config_of(*map(str, periods)), tokens_per_step=1)
    groups = [
        sync_group(level, depth, layers, stagger) for level in levels for depth in range(layers)
    ]
    steps = range(1, levels[-1].period + 1)
    return [sum(group.due(step) for group in groups) / len(groups) for step in steps]


def test_staggering_flattens_the_traffic_and_keeps_its_mean() -> None:
    staggered = traffic((1, 4, 16, 64), 12, stagger=True)
    aligned = traffic((1, 4, 16, 64), 12, stagger=False)
    mean = (1 + 1 / 4 + 1 / 16 + 1 / 64) / 4
    assert sum(staggered) / 64 == pytest.approx(mean) == sum(aligned) / 64
    assert max(aligned) == 1.0
    assert max(staggered) == pytest.approx(0.354, abs=0.001)


@pytest.mark.parametrize("periods", [(1, 2), (1, 8, 64), (1, 6, 36), (2, 12)])
@pytest.mark.parametrize("layers", [2, 5, 12, 24])
def test_the_staggered_peak_is_below_the_aligned_one(periods: tuple[int, ...], layers: int) -> None:
    assert max(traffic(periods, layers, True)) < max(traffic(periods, layers, False))


def test_token_periods_keep_their_tokens_at_any_batch() -> None:
    for tokens_per_step in (1 << 16, 1 << 18, 1 << 20):
        levels = spectrum(config_of("1 step", "8388608 tokens"), tokens_per_step)
        assert levels[1].period * tokens_per_step == 8388608
    assert spectrum(config_of("8M tokens"), 3_000_000)[0].period == 3  # 2.67, the nearest
    assert spectrum(config_of("8M tokens"), 100_000_000)[0].period == 1
    assert spectrum(config_of("16 steps"), 3_000_000)[0].period == 16


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [
        ("1", 1, "steps"),
        ("1 step", 1, "steps"),
        ("16 steps", 16, "steps"),
        ("2k steps", 2000, "steps"),
        ("8M tokens", 8_000_000, "tokens"),
        ("8.3M tokens", 8_300_000, "tokens"),
        ("1.5B tokens", 1_500_000_000, "tokens"),
        ("2G tokens", 2_000_000_000, "tokens"),
        ("  64k   tokens ", 64_000, "tokens"),
    ],
)
def test_periods_read_as_written(text: str, count: int, unit: str) -> None:
    assert Period.parse(text) == Period(count, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "often", "-4", "0", "0.2 steps", "1.5 steps", "16 epochs", "8m tokens", "4 4", "1e3"],
)
def test_what_is_no_period_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^levels\.spectrum\.1\.period .*"):
        spectrum(config_of("1", text), 64)


def test_an_empty_spectrum_is_refused() -> None:
    with pytest.raises(UserError, match=r"levels\.spectrum is empty.*levels=\[1\]"):
        spectrum(LevelsConfig(spectrum=[]), 64)


def test_two_levels_of_one_name_are_refused() -> None:
    entries = [LevelConfig(name="a"), LevelConfig(name="b"), LevelConfig(name="a", period="4")]
    with pytest.raises(UserError, match=r"levels\.spectrum\.2\.name: 'a' is taken"):
        spectrum(LevelsConfig(spectrum=entries), 64)


def test_a_level_faster_than_the_one_before_is_refused_in_steps() -> None:
    config = config_of("1", "10 steps", "64k tokens")
    assert [level.period for level in spectrum(config, 1000)] == [1, 10, 64]
    # at a larger batch the period in tokens is fewer steps than the one in steps
    with pytest.raises(UserError, match=r"levels\.spectrum\.2: period 8 steps .*'level1'"):
        spectrum(config, 8000)


def test_equal_periods_may_stand_side_by_side() -> None:
    assert [level.period for level in spectrum(config_of("1", "4", "4"), 64)] == [1, 4, 4]


@pytest.mark.parametrize(
    ("rule", "scales"),
    [
        (PeriodRule.none, [0.5, 0.5, 0.5]),
        (PeriodRule.sqrt, [0.5, 1.0, 2.0]),
        (PeriodRule.linear, [0.5, 2.0, 8.0]),
    ],
)
def test_the_learning_rate_follows_the_period_by_its_rule(
    rule: PeriodRule, scales: list[float]
) -> None:
    config = config_of("1", "4", "16", learning_rate_rule=rule)
    for entry in config.spectrum:
        entry.learning_rate = 0.5
    assert [level.learning_rate_scale for level in spectrum(config, 64)] == scales


def test_levels_are_numbered_fastest_first() -> None:
    levels = spectrum(config_of("1", "4", "16"), 64)
    assert [(level.index, level.name) for level in levels] == [
        (0, "level0"),
        (1, "level1"),
        (2, "level2"),
    ]
