"""What a run would read of each source of its mixture, before it is started. No torch is imported.

The figures follow from the order itself (`nlscale.data.mixture`), and are those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nlscale.config.curriculum import (
    curriculum,
    mixture_starts,
    samples_of_cuts,
    samples_until,
    step_of,
    tokens_until,
)
from nlscale.config.data_sources import mixtures_of
from nlscale.config.vocabulary import Config
from nlscale.data.folders import Folder, open_folders
from nlscale.data.history import Ordered, identity, rounded
from nlscale.train.mixed import end_of, order_of


@dataclass(frozen=True)
class SourcePlan:
    """What a run, or a part of it with one mixture, reads of a source."""

    name: str
    dir: str
    share: float
    """Of the samples by its weight, while all sources are read; of a run with several mixtures,
    what it comes to."""
    epoch_tokens: int
    """Tokens that an epoch trains on, at the sequence length with which the run begins."""
    samples: int
    """That are read of it."""
    tokens: int
    """That are trained on of it."""
    epochs: float
    ends_after_step: int | None
    """Step after which it has been read as often as it may; None: not before its mixture ends."""


@dataclass(frozen=True)
class MixtureStage:
    """Steps of a run with one mixture."""

    first_step: int
    """Steps of the run before its first."""
    steps: int
    samples: int
    tokens: int
    sources: list[SourcePlan]


@dataclass(frozen=True)
class MixPlan:
    """What a run reads of its sources."""

    steps: int
    samples: int
    """Of the run."""
    tokens: int
    """Of the run."""
    rounded: bool
    """Whether the weights are not exactly those of the recipe."""
    ends_after_step: int | None
    """Step in which all sources have been read as often as they may; None: not before the end."""
    sources: list[SourcePlan]
    """Over the whole run."""
    stages: list[MixtureStage]
    """Of each mixture of the run, in their order."""


def mix_plan(config: Config) -> MixPlan:
    """The plan of a run that begins; one folder alone is the mixture of it.

    Raises:
        UserError: the data are not there, or cannot be mixed.
    """
    folders, stages = open_folders(config.data), curriculum(config)
    found = order_of(identity(folders, config, mixed=True), config, checked=False)
    ends, spans = end_of(found, config), _spans(config)
    planned = [
        MixtureStage(
            first_step=first,
            steps=end - first,
            samples=samples_until(stages, end) - samples_until(stages, first),
            tokens=tokens_until(stages, end) - tokens_until(stages, first),
            sources=_sources(found, folders, config, first, end, number),
        )
        for number, (first, end) in enumerate(spans)
    ]
    several, steps = len(spans) > 1, config.train.steps
    return MixPlan(
        steps=steps,
        samples=samples_until(stages, steps),
        tokens=tokens_until(stages, steps),
        rounded=rounded(folders) is not None,
        ends_after_step=None if ends is None else ends[0],
        sources=_sources(found, folders, config, 0, steps) if several else planned[0].sources,
        stages=planned,
    )


def _spans(config: Config) -> list[tuple[int, int]]:
    """The steps of a run before each of its mixtures, and at its end."""
    starts = mixture_starts(config)
    return list(zip(starts, [*starts[1:], config.train.steps], strict=True))


def _sources(
    found: Ordered,
    folders: Sequence[Folder],
    config: Config,
    first: int,
    end: int,
    number: int | None = None,
) -> list[SourcePlan]:
    """What is read of each source in the steps between two; of the mixture of that number."""
    (tokens, epochs), before = (found.read(_read(found, config, step)) for step in (end, first))
    counts, counts_before = _counts(found, config, end), _counts(found, config, first)
    whole = sum(counts) - sum(counts_before)
    cut, planned = found.cuts[0], []
    for folder in folders:
        if number is not None and not folder.weights[number]:
            continue
        place = found.fingerprints.index(folder.fingerprint)
        samples = counts[place] - counts_before[place]
        planned.append(
            SourcePlan(
                name=folder.name,
                dir=str(folder.train.directory),
                share=samples / max(1, whole)
                if number is None
                else _share(folders, folder, number),
                epoch_tokens=cut.lengths[place] * cut.sequence_length,
                samples=samples,
                tokens=tokens[place] - before[0][place],
                epochs=epochs[place] - before[1][place],
                ends_after_step=_last_step(found, place, config, first, end),
            )
        )
    return planned


def _share(folders: Sequence[Folder], folder: Folder, number: int) -> float:
    return float(folder.weights[number] / sum(each.weights[number] for each in folders))


def _read(found: Ordered, config: Config, step: int) -> list[int]:
    """Samples of each cut that so many steps read."""
    stages = curriculum(config)
    return samples_of_cuts(stages, samples_until(stages, step) + found.beyond)


def _counts(found: Ordered, config: Config, step: int) -> list[int]:
    """Samples of each source that so many steps read."""
    return [sum(of) for of in zip(*found.counts(_read(found, config, step)), strict=True)]


def _last_step(found: Ordered, place: int, config: Config, first: int, end: int) -> int | None:
    """The step between two after which a source is read no more before the latter, at its limit."""
    stages = curriculum(config)
    steps = [
        step_of(stages, number, cut.order.ended[place] - found.beyond)
        for number, cut in enumerate(found.cuts)
        if place in cut.order.ended
    ]
    at_end = _counts(found, config, end)[place]
    return next(
        (s for s in steps if first < s < end and _counts(found, config, s)[place] == at_end), None
    )


def lines(found: Ordered | None, folders: Sequence[Folder], config: Config) -> list[str]:
    """What is said of the mixtures of a run at its start; nothing of one folder."""
    if found is None or not mixtures_of(config.data):
        return []
    said = []
    for number, (first, end) in enumerate(_spans(config)):
        shares = []
        for folder in folders:
            if folder.weights[number]:
                place = found.fingerprints.index(folder.fingerprint)
                last = _last_step(found, place, config, first, end)
                until = f" until step {last:,}" if last is not None else ""
                shares.append(f"{_share(folders, folder, number):.3g} {folder.name}{until}")
        begin = f" from step {first + 1:,}" if first else ""
        said.append(f"mixture{begin}: {', '.join(shares)}")
    note = rounded(folders)
    return [*said, *([note] if note else [])]
