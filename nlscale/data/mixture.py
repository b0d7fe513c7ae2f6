"""The order of a mixture: of each sample of a run, from which source it is, and which of it.

A pure function of the seed, the weights and the global sample number, as the order of one source
is (`nlscale.data.order`): nothing is stored and nothing advanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from nlscale.data.apportion import period
from nlscale.data.order import SampleOrder


@dataclass(frozen=True)
class Segment:
    """Weights that hold from a sample of the run on, until those of the next segment do."""

    first_sample: int
    """Global number of the sample from which they hold."""
    parts: tuple[int, ...]
    """The weight of each source, in parts of their sum; 0: it is not read."""
    limits: tuple[int | None, ...]
    """Samples of each source that the run reads at most, those of segments before included."""


@dataclass(frozen=True)
class _Stretch:
    """Sources that are read in the same ratio: a segment, or what of it lies between two ends."""

    first: int
    """Global number of its first sample."""
    base: NDArray[np.int64]
    """Samples of each source that were read before it: [sources]."""
    parts: NDArray[np.int64]
    """Of each source in a period: [sources]."""
    order: NDArray[np.int32]
    """The source of each place of a period: [D]."""
    rank: NDArray[np.int32]
    """Places of the same source before it in the period: [D]."""

    def counts(self, samples: int) -> NDArray[np.int64]:
        """Samples of each source that were read when so many of the stretch were: [sources]."""
        periods, places = divmod(samples, len(self.order))
        last = np.bincount(self.order[:places], minlength=len(self.parts))
        return self.base + periods * self.parts + last

    def samples_until(self, source: int, count: int) -> int:
        """Samples of the stretch up to and with that which brings a source to `count`."""
        left, q = count - int(self.base[source]), int(self.parts[source])
        periods, place = divmod(left - 1, q)
        places = np.flatnonzero(self.order == source)
        return periods * len(self.order) + int(places[place]) + 1


class Mixture:
    r"""Which sample of which source each global sample number of a run stands for.

    Within a segment, the sources come in the order of `nlscale.data.apportion.period`, over and
    over: of the first n samples source i has $n w_i$, to within less than one sample, at every n.
    Number n_i of source i is what `SampleOrder(lengths[i], seed)` says: no sample comes twice in an
    epoch of its source, also where weights change. A source that has come to its limit is read no
    more; the others go on in the ratio that they have to each other, from the next sample on.

    Of one source it is that source's own order. The place of a source among the others decides
    between those whose turns end together, and nothing else.

    Args:
        lengths: samples of an epoch of each source.
        segments: in the order of their first samples, the first of them 0.
        seed: of the order within each source.
        samples: global numbers up to which the order is wanted: those of the run.

    Fields: `ends` (the number of samples after which all sources have come to their limits; None:
    not before `samples`), `ended` (the number of samples after which each source has come to its
    limit, by source, those that do).

    Raises:
        ValueError: no segments, or not in their order; of other sources than `lengths`; or of none
            there is anything to read.
    """

    def __init__(
        self, lengths: Sequence[int], segments: Sequence[Segment], seed: int, samples: int
    ) -> None:
        firsts = [segment.first_sample for segment in segments]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ValueError(f"segments begin at {firsts}; they must at 0, and then each later")
        self.samples = samples
        self.ends: int | None = None
        self.ended: dict[int, int] = {}
        self._orders = [SampleOrder(length, seed) for length in lengths]
        self._stretches: list[_Stretch] = []
        base = np.zeros(len(lengths), dtype=np.int64)
        for number, segment in enumerate(segments):
            if not len(segment.parts) == len(segment.limits) == len(lengths):
                raise ValueError(f"segment {number} is not of {len(lengths)} sources")
            at_limit = {
                i
                for i, limit in enumerate(segment.limits)
                if segment.parts[i] and limit is not None and base[i] >= limit
            }
            self.ended = {
                # of limits that are below what was read, from the first sample of the segment on
                **{i: self.ended.get(i, firsts[number]) for i in at_limit},
                **{i: n for i, n in self.ended.items() if not segment.parts[i]},
            }
            last = number + 1 == len(segments)
            end = max(samples, firsts[-1] + 1) if last else firsts[number + 1]
            base = self._cut(segment, base, end)
            if self.ends is not None:  # and no later segment is come to
                break
        if not self._stretches:
            raise ValueError("of no source there is anything to read")
        self._firsts = np.array([stretch.first for stretch in self._stretches])

    @property
    def end(self) -> int:
        """The number of samples of which the order is known: those of the run, if there are."""
        return self.samples if self.ends is None else min(self.ends, self.samples)

    @property
    def read(self) -> frozenset[int]:
        """The sources of which there is a sample in it."""
        return frozenset(
            i for stretch in self._stretches for i in np.flatnonzero(stretch.parts).tolist()
        )

    def take(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and sample of the global sample numbers first .. first + count - 1.

        Returns:
            int64 [count], the place of the source among `lengths`; int64 [count], the sample of it.

        Raises:
            ValueError: a negative number, or samples beyond the end of the run or of all sources.
        """
        if first < 0 or count < 0 or first + count > self.end:
            raise ValueError(f"samples {first} to {first + count} are not among 0 to {self.end}")
        sources = np.empty(count, dtype=np.int64)
        numbers = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            place = self._place(first + done)
            stretch, here = self._stretches[place], count - done
            if place + 1 < len(self._stretches):
                here = min(here, self._stretches[place + 1].first - first - done)
            part = slice(done, done + here)
            begin = first + done - stretch.first
            periods, places = np.divmod(np.arange(begin, begin + here), len(stretch.order))
            own = stretch.order[places]
            sources[part] = own
            numbers[part] = stretch.base[own] + periods * stretch.parts[own] + stretch.rank[places]
            done += here
        samples = np.empty(count, dtype=np.int64)
        for source in np.unique(sources):
            rows = np.flatnonzero(sources == source)
            # one after another: between two of a source all its numbers have been taken
            samples[rows] = self._orders[source].take(int(numbers[rows[0]]), len(rows))
        return sources, samples

    def counts(self, samples: int) -> NDArray[np.int64]:
        """How many of the first `samples` samples are of each source: int64 [sources].

        Raises:
            ValueError: a negative number, or one beyond the end of the run or of all sources.
        """
        if not 0 <= samples <= self.end:
            raise ValueError(f"{samples} samples are not among 0 to {self.end}")
        stretch = self._stretches[self._place(max(0, samples - 1))]
        return stretch.counts(samples - stretch.first)

    def _place(self, number: int) -> int:
        return int(np.searchsorted(self._firsts, number, side="right")) - 1

    def _cut(self, segment: Segment, base: NDArray[np.int64], end: int) -> NDArray[np.int64]:
        """Add the stretches of a segment, up to the sample at which the next begins.

        Returns:
            Samples of each source that have been read by then.
        """
        first = segment.first_sample
        while first < end:
            going = [
                q if limit is None or base[i] < limit else 0
                for i, (q, limit) in enumerate(zip(segment.parts, segment.limits, strict=True))
            ]
            if not any(going):
                self.ends = first
                return base
            stretch = _stretch(first, base, going)
            to_end = {
                i: stretch.samples_until(i, limit)
                for i, limit in enumerate(segment.limits)
                if going[i] and limit is not None
            }
            size = min([end - first, *to_end.values()])
            base, first = stretch.counts(size), first + size
            self._stretches.append(stretch)
            self.ended |= {i: first for i, own in to_end.items() if own == size}
        return base


def _stretch(first: int, base: NDArray[np.int64], going: list[int]) -> _Stretch:
    common = gcd(*going)
    parts = np.array([q // common for q in going], dtype=np.int64)
    order = period(parts.tolist())
    rank = np.empty(len(order), dtype=np.int32)
    for source in np.flatnonzero(parts):
        rank[order == source] = np.arange(parts[source])
    return _Stretch(first, base, parts, order, rank)
