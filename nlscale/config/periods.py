"""Periods that change in a run, as a pure function of the configuration and the step. No torch.

`levels.period_warmup` bounds the period of every level alike: a window that begins after s steps of
the run has the period min(C, cap(s)), with C that of the spectrum. A cap is 1, 2, 4, ... or none. A
window that has begun keeps its period, so that a change comes at the end of a window
(docs/concepts/levels.md). Nothing that is measured enters, so that a run that is resumed, another
layout and the plan find the same windows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nlscale.config.curriculum import TrainingStage, curriculum, places, stage_of
from nlscale.config.period_warmup import CriticalBatch, PeriodWarmupConfig
from nlscale.config.schema import where
from nlscale.config.units import Period, Start
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError

_KEY = "levels.period_warmup"


class Piece(NamedTuple):
    """Windows that begin after so many steps have a period, until the next piece."""

    begins: int
    """Steps of the run before it."""
    period: int


@dataclass(frozen=True)
class PeriodChanges:
    """The periods of a level whose period changes."""

    steps: int
    """Of the run."""
    pieces: tuple[Piece, ...]
    """The first begins with the run."""

    def period_after(self, step: int) -> int:
        """Of a window that begins after so many steps."""
        return next(p.period for p in reversed(self.pieces) if p.begins <= step)


class Stretch(NamedTuple):
    """Windows of a sync group that follow each other at one period."""

    begins: int
    """Steps of the run before its first window."""
    period: int
    phase: int
    """Its windows end at the steps, from 1, that are this (mod period)."""

    def end_after(self, step: int) -> int:
        """The first step after so many at which one of its windows ends."""
        return step + 1 + (self.phase - step - 1) % self.period

    def ends(self, first: int, last: int) -> int:
        """How many of its windows end after `first` steps and until `last`."""
        return max(0, (last - self.phase) // self.period - (first - self.phase) // self.period)


def stretches(changes: PeriodChanges | None, phase: int, period: int) -> tuple[Stretch, ...]:
    """The windows of a sync group, from the first step of a run on.

    At a shorter period C' the phase is floor(phase C' / period): where C' divides the period, what
    the same depth has at C' (`nlscale.levels.spectrum.phase`). A window that is longer than a piece
    passes over it.

    Args:
        changes: of its level; None: there are none.
        phase: at the longest period.
        period: the longest.
    """
    if changes is None:
        return (Stretch(0, period, phase),)
    found: list[Stretch] = []
    begins, pieces = 0, changes.pieces
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        if following is not None and following.begins <= begins:
            continue
        found.append(Stretch(begins, piece.period, phase * piece.period // period))
        if following is not None:
            begins = found[-1].end_after(following.begins - 1)
    return tuple(found)


def stretch_of(found: Sequence[Stretch], step: int) -> Stretch:
    """The stretch whose window holds a step, counted from 1; of none before, the first."""
    return found[max(0, bisect_left(found, step, key=lambda own: own.begins) - 1)]


def period_caps(
    warmup: PeriodWarmupConfig,
    stages: Sequence[TrainingStage],
    longest: int,
    sources: Mapping[str, str] | None = None,
) -> list[Piece]:
    """How long a period may be, by the steps before a window begins.

    Args:
        warmup: the section.
        stages: of the run.
        longest: period of the spectrum, in steps: what bounds no level.
        sources: where each key was read, for errors.

    Raises:
        UserError: a place in the run or a number of tokens that is none; a cool-down before the
            warm-up is over; a list that is out of order.
    """
    sources = sources or {}
    steps = stages[-1].first_step + stages[-1].steps
    grown = _place("steps", warmup.steps, steps, sources) or 0
    falls = _place("cooldown", warmup.cooldown, steps, sources)
    if falls is not None and falls >= steps:
        raise UserError(
            f"{_KEY}.cooldown: {warmup.cooldown!r} is not before the end of a run of {steps:,} "
            f"steps; begin earlier, or give more train.steps{where(f'{_KEY}.cooldown', sources)}"
        )
    if falls is not None and falls < grown:
        raise UserError(
            f"{_KEY}.cooldown: {warmup.cooldown!r} is after {falls:,} of {steps:,} steps, and the "
            f"periods grow for {grown:,}; begin later, or give a shorter {_KEY}.steps"
            f"{where(f'{_KEY}.cooldown', sources)}"
        )
    rungs = (longest - 1).bit_length()
    caps = []
    if grown and rungs:
        caps.append(_rungs(0, grown, [2**i for i in range(rungs)], longest))
    if falls is not None and rungs:
        down = [2**i for i in reversed(range(rungs))]
        caps.append([Piece(0, longest), *_rungs(falls, steps, down, 1)[:-1]])
    critical = _critical(warmup, steps, sources)
    if critical:
        caps.append(_bounded(critical, warmup.share, stages, longest))
    return _merged(caps, longest)


def caps_of_plain(
    levels: Mapping[str, Any], stages: Sequence[TrainingStage], longest: int
) -> list[Piece]:
    """`period_caps` of a section `levels` that was saved as plain dicts and lists."""
    saved = levels.get("period_warmup") or {}
    entries = [
        CriticalBatch(entry["from"], entry["tokens"]) for entry in saved.get("critical_batch", [])
    ]
    known = {name: saved[name] for name in ("steps", "share", "cooldown") if name in saved}
    return period_caps(PeriodWarmupConfig(critical_batch=entries, **known), stages, longest)


def changes_of(caps: Sequence[Piece], steps: int, period: int) -> PeriodChanges | None:
    """The periods of a level of a run of so many steps under caps; None: always its own."""
    pieces = [piece for piece in _merged([caps], period) if piece.begins < steps]
    if pieces == [Piece(0, period)]:
        return None
    return PeriodChanges(steps, tuple(pieces))


def check(config: Config, sources: Mapping[str, str] | None = None) -> None:
    """Check `levels.period_warmup`.

    Raises:
        UserError: see `period_caps`.
    """
    period_caps(config.levels.period_warmup, curriculum(config), 1, sources)


def periods_alike_until(config: Config, steps: int) -> int:
    """The first steps of a run of that many that have the same windows in any longer run."""
    warmup = config.levels.period_warmup
    shares = [entry.from_ for entry in warmup.critical_batch]
    shared = [start for start in map(Start.parse, shares) if start.unit == "%"]
    found = [steps, *filter(None, (start.in_steps(steps) for start in shared))]
    if warmup.cooldown is not None:
        found.append(Start.parse(warmup.cooldown).in_steps(steps))
    if warmup.steps is not None and Start.parse(warmup.steps).unit == "%":
        found.append(0)
    return min(found)


def _place(name: str, text: str | None, steps: int, sources: Mapping[str, str]) -> int | None:
    """Steps of a run of that many before a place in it."""
    if text is None:
        return None
    key = f"{_KEY}.{name}"
    try:
        place = Start.parse(text).in_steps(steps)
    except UserError as error:
        raise UserError(f"{key}: {error}{where(key, sources)}") from None
    return place


def _critical(
    warmup: PeriodWarmupConfig, steps: int, sources: Mapping[str, str]
) -> list[tuple[int, int]]:
    """The places of the critical batch, and its tokens from there on."""
    key, entries = f"{_KEY}.critical_batch", warmup.critical_batch
    found = places(key, entries, steps, sources)
    if found and found[0]:
        raise UserError(
            f"{key}: no entry begins with the run; the first is such as {{from: 0%, tokens: 100k "
            f"tokens}}{where(key, sources)}"
        )
    tokens = []
    for index, entry in enumerate(entries):
        at = f"{key}.{index}.tokens"
        try:
            given = Period.parse(entry.tokens)
        except UserError:
            given = None
        if given is None or given.unit != "tokens":
            raise UserError(
                f"{at}: {entry.tokens!r} is no number of tokens; write for example '500k tokens'"
                f"{where(at, sources)}"
            )
        tokens.append(given.count)
    return list(zip(found, tokens, strict=True))


def _rungs(first: int, last: int, periods: Sequence[int], after: int) -> list[Piece]:
    """Periods that hold for equal parts of the steps from one to another, and one after these."""
    parts = len(periods)
    begins = [first + -(-i * (last - first) // parts) for i in range(parts)]
    return [Piece(*each) for each in zip([*begins, last], [*periods, after], strict=True)]


def _bounded(
    critical: Sequence[tuple[int, int]],
    share: float,
    stages: Sequence[TrainingStage],
    longest: int,
) -> list[Piece]:
    """Periods, powers of 2, whose tokens are no more than a share of the critical batch."""
    found = []
    for begins in sorted({*(place for place, _ in critical), *(s.first_step for s in stages)}):
        tokens = next(tokens for place, tokens in reversed(critical) if place <= begins)
        most = int(share * tokens / stage_of(stages, begins + 1).tokens_per_step)
        cap = longest if most >= longest else 2 ** (max(1, most).bit_length() - 1)
        found.append(Piece(begins, cap))
    return found


def _merged(caps: Sequence[Sequence[Piece]], longest: int) -> list[Piece]:
    """The least of several at every step, and of a period; pieces that change something."""
    found: list[Piece] = []
    for begins in sorted({0, *(piece.begins for pieces in caps for piece in pieces)}):
        holds = [[p.period for p in pieces if p.begins <= begins][-1] for pieces in caps]
        period = min([longest, *holds])
        if not found or found[-1].period != period:
            found.append(Piece(begins, period))
    return found
