"""What settings of the levels save and cost beside the one that sends most, from pairs of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nlscale.scaling.compare.paired import FEWEST, Paired, paired
from nlscale.scaling.law.network import Sent

LEVEL = 0.95
"""With which the intervals of all settings hold together."""
_DIGITS = 9  # of a logarithm: settings that send the same number of bytes


@dataclass(frozen=True)
class Saving:
    """What a setting saves and costs beside the reference, over pairs of runs.

    A pair is two runs of one group and seed. Fewer than three have no interval.

    Attributes:
        setting: its name; `reference`: that of the one it is compared with.
        periods: of the levels, in steps.
        fewer: bytes of the reference over bytes, geometric mean over the pairs.
        nats: what it costs, nats per token above the reference, a pair each.
        percent: the same in percent of the reference's loss.
    """

    setting: str
    reference: str
    periods: str
    fewer: float
    nats: Paired
    percent: Paired

    @property
    def costs(self) -> tuple[float, ...]:
        """Nats per token above the reference, a pair each."""
        return self.nats.differences

    @property
    def loss(self) -> float:
        """The mean cost, nats per token."""
        return self.nats.mean

    @property
    def standard_error(self) -> float | None:
        """Of the mean cost; None from one pair."""
        deviation = self.nats.deviation
        return None if deviation is None else deviation / math.sqrt(len(self.costs))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean cost, nats per token."""
        return _interval(self.nats)

    @property
    def relative_interval(self) -> tuple[float, float] | None:
        """Of the mean cost, percent of the reference's loss."""
        return _interval(self.percent)


@dataclass(frozen=True)
class Mean:
    """The runs of one group and setting, which differ in their seed: means over them."""

    family: str
    setting: str
    group: int
    n: float
    tokens: float
    bytes: float
    loss: float


def _interval(found: Paired) -> tuple[float, float] | None:
    return found.interval if len(found.differences) >= FEWEST else None


def savings(runs: Sequence[Sent]) -> list[Saving]:
    """Each setting beside the one that sends most a token and parameter, most bytes first.

    The intervals hold together with the level `LEVEL` (`nlscale.scaling.compare.paired`). A setting
    that shares no group and seed with the reference is left out.
    """
    reference, *others = by_setting(runs)
    pairs = {other: found for other in others if (found := _pairs(runs, reference, other))}
    saved = []
    for setting, of_it in pairs.items():
        nats = [b.loss - a.loss for a, b in of_it]
        percent = [100 * (b.loss / a.loss - 1) for a, b in of_it]
        saved.append(
            Saving(
                setting=setting,
                reference=reference,
                periods=next(run.periods for run in runs if run.setting == setting),
                fewer=statistics.geometric_mean(a.bytes / b.bytes for a, b in of_it),
                nats=paired(nats, LEVEL, len(pairs)),
                percent=paired(percent, LEVEL, len(pairs)),
            )
        )
    return saved


def by_setting(runs: Sequence[Sent]) -> list[str]:
    """The settings among the runs, that which sends most first; of equal ones the shorter name."""
    shares: dict[str, list[float]] = {}
    for run in runs:
        shares.setdefault(run.setting, []).append(math.log(run.bytes_per_token / run.n))
    sent = {setting: round(statistics.fmean(of), _DIGITS) for setting, of in shares.items()}
    return sorted(sent, key=lambda setting: (-sent[setting], len(setting), setting))


def alike(runs: Sequence[Sent]) -> list[list[Mean]]:
    """The runs by their group, in each a mean for each setting, fewest bytes first."""
    groups: dict[int, dict[str, list[Sent]]] = {}
    for run in runs:
        groups.setdefault(run.group, {}).setdefault(run.setting, []).append(run)
    found = [[_mean(of) for of in settings.values()] for settings in groups.values()]
    return [sorted(means, key=lambda mean: (mean.bytes, mean.loss)) for means in found]


def least(means: Sequence[Mean]) -> list[Mean]:
    """Those that no other betters in loss for as few bytes, fewest bytes first."""
    found: list[Mean] = []
    for mean in sorted(means, key=lambda mean: (mean.bytes, mean.loss)):
        if not found or mean.loss < found[-1].loss:
            found.append(mean)
    return found


def _pairs(runs: Sequence[Sent], reference: str, setting: str) -> list[tuple[Mean, Mean]]:
    """Of each group and seed that both have; runs of the same place are averaged."""
    dealt: dict[str, dict[tuple[int, str], list[Sent]]] = {reference: {}, setting: {}}
    for run in runs:
        if run.setting in dealt:
            dealt[run.setting].setdefault((run.group, run.seed), []).append(run)
    first, second = dealt[reference], dealt[setting]
    both = sorted(first.keys() & second.keys())
    return [(_mean(first[place]), _mean(second[place])) for place in both]


def _mean(runs: Sequence[Sent]) -> Mean:
    one = runs[0]
    return Mean(
        family=one.family,
        setting=one.setting,
        group=one.group,
        n=one.n,
        tokens=one.tokens,
        bytes=statistics.fmean(run.bytes for run in runs),
        loss=statistics.fmean(run.loss for run in runs),
    )
