"""What a run would read of each source of its mixture, before it is started. No torch is imported.

The figures follow from the order itself (`nlscale.data.mixture`), and are those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nlscale.config.vocabulary import Config
from nlscale.data.folders import Folder, open_folders
from nlscale.data.history import Ordered, identity, rounded
from nlscale.train.mixed import order_of


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
    folders = open_folders(config.data)
    length = config.data.sequence_length
    found = order_of(identity(folders, length, mixed=True), config, checked=False)
    order, batch = found.order, config.train.global_batch
    counts = dict(zip(found.fingerprints, order.counts(order.end).tolist(), strict=True))
    whole = sum(folder.weight for folder in folders)
    sources = []
    for folder in folders:
        place = found.fingerprints.index(folder.fingerprint)
        count, samples = counts[folder.fingerprint], found.lengths[place]
        end = order.ended.get(place)
        sources.append(
            SourcePlan(
                name=folder.name,
                dir=str(folder.train.directory),
                share=float(folder.weight / whole),
                epoch_tokens=samples * length,
                samples=count,
                tokens=count * length,
                epochs=count / samples,
                ends_after_step=None if end is None or end >= order.samples else -(-end // batch),
            )
        )
    return MixPlan(
        steps=config.train.steps,
        samples=order.samples,
        tokens=order.samples * length,
        rounded=rounded(folders) is not None,
        ends_after_step=None if order.end == order.samples else order.end // batch,
        sources=sources,
    )


def lines(found: Ordered | None, folders: Sequence[Folder], config: Config) -> list[str]:
    """What is said of a mixture at the start of a run; nothing of one folder."""
    if found is None or not config.data.mixture:
        return []
    whole = sum(folder.weight for folder in folders)
    said = []
    for folder in folders:
        place = found.fingerprints.index(folder.fingerprint)
        end = found.order.ended.get(place)
        until = ""
        if end is not None and end < found.order.samples:
            until = f" until step {-(-end // config.train.global_batch):,}"
        said.append(f"{float(folder.weight / whole):.3g} {folder.name}{until}")
    note = rounded(folders)
    return [f"mixture: {', '.join(said)}", *([note] if note else [])]
