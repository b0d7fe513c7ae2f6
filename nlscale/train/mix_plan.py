"""What a run would read of each source of its mixture, before it is started. No torch is imported.

The figures follow from the order itself (`nlscale.data.mixture`), and are those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nlscale.config.curriculum import (
    TrainingStage,
    curriculum,
    samples_until,
    step_of,
    tokens_until,
)
from nlscale.config.vocabulary import Config
from nlscale.data.folders import Folder, open_folders
from nlscale.data.history import Ordered, identity, rounded
from nlscale.train.mixed import end_of, order_of


@dataclass(frozen=True)
class SourcePlan:
    """What a run reads of a source."""

    name: str
    dir: str
    share: float
    """Of the samples, while all sources are read."""
    epoch_tokens: int
    """Tokens that an epoch trains on."""
    samples: int
    """That the run reads of it."""
    tokens: int
    """That it trains on of it."""
    epochs: float
    ends_after_step: int | None
    """Step after which it is not read any more; None: it is read until the run ends."""


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


def mix_plan(config: Config) -> MixPlan:
    """The plan of a run that begins; one folder alone is the mixture of it.

    Raises:
        UserError: the data are not there, or cannot be mixed.
    """
    folders, stages = open_folders(config.data), curriculum(config)
    found = order_of(identity(folders, config, mixed=True), config, checked=False)
    counts = found.counts([cut.order.end for cut in found.cuts])
    tokens, epochs = found.read()
    whole = sum(folder.weight for folder in folders)
    sources = []
    for folder in folders:
        place = found.fingerprints.index(folder.fingerprint)
        first = found.cuts[0]
        sources.append(
            SourcePlan(
                name=folder.name,
                dir=str(folder.train.directory),
                share=float(folder.weight / whole),
                epoch_tokens=first.lengths[place] * first.sequence_length,
                samples=sum(count[place] for count in counts),
                tokens=tokens[place],
                epochs=epochs[place],
                ends_after_step=_last_step(found, place, stages),
            )
        )
    ends = end_of(found, config)
    return MixPlan(
        steps=config.train.steps,
        samples=samples_until(stages, config.train.steps),
        tokens=tokens_until(stages, config.train.steps),
        rounded=rounded(folders) is not None,
        ends_after_step=None if ends is None else ends[0],
        sources=sources,
    )


def _last_step(
    found: Ordered, place: int, stages: Sequence[TrainingStage], beyond: int = 0
) -> int | None:
    """The step after which a source is not read any more; None: it is until its last cut ends."""
    read = [cut for cut, of in enumerate(found.cuts) if place in of.order.read]
    order = found.cuts[read[-1]].order
    end = order.ended.get(place)
    if end is None or end >= order.samples:
        return None
    return step_of(stages, read[-1], end - beyond)


def lines(found: Ordered | None, folders: Sequence[Folder], config: Config) -> list[str]:
    """What is said of a mixture at the start of a run; nothing of one folder."""
    if found is None or not config.data.mixture:
        return []
    whole = sum(folder.weight for folder in folders)
    said = []
    for folder in folders:
        end = _last_step(found, found.fingerprints.index(folder.fingerprint), curriculum(config))
        until = f" until step {end:,}" if end is not None else ""
        said.append(f"{float(folder.weight / whole):.3g} {folder.name}{until}")
    note = rounded(folders)
    return [f"mixture: {', '.join(said)}", *([note] if note else [])]
