"""The sources of a run whose data are a mixture: their order, and their held-out sequences.

No torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlscale.config.curriculum import curriculum, mixture_starts, step_of
from nlscale.config.data_sources import mixtures_of
from nlscale.config.vocabulary import Config
from nlscale.data.folders import Folder
from nlscale.data.history import CutOrder, Ordered, gone_on, identity, is_mixed, ordered
from nlscale.data.reader import MixtureReader, Samples
from nlscale.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """What a validation reads of a source."""

    name: str
    """Of the source."""
    samples: Samples
    share: float
    """Of the source in the loss of the mixture with which the run begins, 0 where it comes later;
    of one, 1."""


def held_out(folders: Sequence[Folder], config: Config, sequence_length: int) -> list[HeldOut]:
    """The held-out sequences of each source, as many as its weight makes of all, at least one.

    Weights are those with which the run begins, so that its losses are of one text throughout.
    Of one source all of them; `train.validation_sequences` are not more than a validation reads.

    Raises:
        UserError: the split of a source holds no sample.
    """
    splits = [Samples(folder.held_out, sequence_length) for folder in folders]
    if not mixtures_of(config.data):
        return [HeldOut(folders[0].name, splits[0], 1.0)]
    weights = np.array([float(folder.weights[0]) for folder in folders])
    shares = weights / weights.sum()
    counts = _dealt(shares, config.train.validation_sequences)
    return [
        HeldOut(folder.name, split.first(count), float(share))
        for folder, split, count, share in zip(folders, splits, counts, shares, strict=True)
    ]


def mean(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Their weighted mean, of those that there are; None where there are none."""
    there = [(value, w) for value, w in zip(values, weights, strict=True) if value is not None]
    whole = sum(weight for _, weight in there)
    return sum(value * weight for value, weight in there) / whole if whole else None


def unigram_bits_per_byte(validation: Sequence[HeldOut]) -> float | None:
    """What the frequencies of each source's training tokens reach on its held-out text.

    Of a mixture the mean over its bytes; None where a source has no text.
    """
    validation = [each for each in validation if each.share]
    figures = [each.samples.shards.index["unigram_bits_per_byte"] for each in validation]
    if len(figures) == 1 or None in figures:
        return figures[0] if len(figures) == 1 else None
    return mean(figures, [each.share * each.samples.shards.bytes_per_token for each in validation])


def order_of(
    data: Mapping[str, Any], config: Config, checked: bool = True, beyond: int = 0
) -> Ordered:
    """The order of the sources of a mixture over the run.

    Args:
        data: what identifies them, see `nlscale.data.history`.
        config: of the run.
        checked: refuse a mixture that ends before the run does.
        beyond: see `nlscale.data.history.samples_beyond`, of where the run stands.

    Raises:
        UserError: all sources have been read as often as they may before the run ends.
    """
    found = ordered(data, config, beyond)
    ends = end_of(found, config)
    if checked and ends is not None:
        step, order = ends
        stages = curriculum(config)
        among = "the run" if len(found.cuts) == 1 else f"{order.sequence_length:,} tokens"
        fewer = (
            f", or take train.steps={step}"
            if len(stages) == len(mixture_starts(config)) == 1
            else ""
        )
        raise UserError(
            f"data.mixture ends after {order.order.end:,} of the {order.order.samples:,} samples "
            f"of {among}, in step {step + 1:,}, as all its sources have been read as often as "
            f"their epochs allow; leave out epochs of one{fewer}"
        )
    return found


def end_of(found: Ordered, config: Config) -> tuple[int, CutOrder] | None:
    """The last step that a mixture that ends before the run does is enough for, and in which cut.

    None: it does not.
    """
    stages = curriculum(config)
    ends = [
        (step_of(stages, cut, order.order.end - found.beyond + 1) - 1, order)
        for cut, order in enumerate(found.cuts)
        if order.order.end < order.order.samples
    ]
    return min(ends, key=lambda end: end[0], default=None)


def readers_of(found: Ordered, folders: Sequence[Folder]) -> list[MixtureReader]:
    """What reads the samples of each cut in that order.

    Raises:
        UserError: a source that is read in a cut holds no sample of its length.
    """
    trains = {folder.fingerprint: folder.train for folder in folders}
    readers = []
    for cut in found.cuts:
        read = cut.order.read
        sources = [
            Samples(trains[each], cut.sequence_length) if each in trains and place in read else None
            for place, each in enumerate(found.fingerprints)
        ]
        readers.append(MixtureReader(sources, cut.order))
    return readers


def data_from(
    state: Mapping[str, Any] | None, data: dict[str, Any], folders: Sequence[Folder], config: Config
) -> dict[str, Any]:
    """What identifies the data of a run that goes on from a checkpoint.

    Args:
        state: of the checkpoint; None: there is none.
        data: what identifies the data that it is to read from now on.
        folders: the same data.
        config: of the run.
    """
    if state is None or not (is_mixed(state["data"]) or is_mixed(data)):
        return data
    now = identity(folders, config, mixed=True)
    return gone_on(state["data"], now, config, state["step"], state["samples"])


def _dealt(shares: Any, count: int) -> list[int]:
    """A number of sequences by shares, by largest remainders; at least 1 each."""
    whole = np.floor(shares * count).astype(int)
    by_rest = np.argsort(whole - shares * count, kind="stable")
    whole[by_rest[: max(0, count - int(whole.sum()))]] += 1
    return [max(1, int(each)) for each in whole]
