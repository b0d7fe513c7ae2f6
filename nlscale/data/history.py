"""What identifies the data of a run, and of a mixture its weights from the first sample on.

In the form in which a checkpoint keeps it. Of one folder, `data.dir`:

    {"fingerprint": "ab12...", "train_tokens": 1000000, "tokenizer": "bytes sha256:..."}

and of a mixture also its segments, from each of which on other weights hold:

    "mixture": [{"first_sample": 0, "sources": {"ab12...": {"name": "web", "parts": 3,
                 "epochs": null, "samples": 976}, ...}}]

Sources are recognised by their fingerprints, whatever they are called and wherever they lie; the
order is a function of these segments, the seed and the global sample number. One folder is the
mixture of one source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlscale.data.apportion import MOST_PARTS, parts_of
from nlscale.data.folders import Folder
from nlscale.data.index import tokenizer_of
from nlscale.data.mixture import Mixture, Segment
from nlscale.data.reader import samples_in
from nlscale.errors import UserError

Sources = Mapping[str, Mapping[str, Any]]
"""Of a segment: what is said of each source, by fingerprint."""
_TOLD_BY = ("parts", "epochs")
"""Of a source, what the order follows from, beside the data."""


@dataclass(frozen=True)
class Ordered:
    """The sources that a run has read or will, and the order in which it does."""

    fingerprints: list[str]
    """By the place of a source in `order`."""
    names: list[str]
    """The same; no two alike."""
    lengths: list[int]
    """Samples of an epoch; the same."""
    order: Mixture
    shown: list[int]
    """Places in the order of the recipe, and then those that are read no more."""


def identity(folders: Sequence[Folder], sequence_length: int, mixed: bool) -> dict[str, Any]:
    """What identifies the data of a run that begins.

    Args:
        folders: of the run.
        sequence_length: tokens a sample trains on.
        mixed: whether they are a mixture, which may be of one.

    Raises:
        UserError: the share of a source is too small to be told from none.
    """
    prints = [folder.fingerprint for folder in folders]
    one = len(prints) == 1
    whole = prints[0] if one else hashlib.sha256("".join(sorted(prints)).encode()).hexdigest()
    found: dict[str, Any] = {
        "fingerprint": whole,
        "train_tokens": sum(folder.train.tokens for folder in folders),
    }
    if tokenizer := next(filter(None, (tokenizer_of(f.train.index) for f in folders)), None):
        found["tokenizer"] = tokenizer
    if not mixed:
        return found
    parts, _ = parts_of([folder.weight for folder in folders])
    for folder, part in zip(folders, parts, strict=True):
        if not part:
            share = float(folder.weight / sum(each.weight for each in folders))
            raise UserError(
                f"data.mixture: the share of {folder.name} is {share:.2g}, and shares are rounded "
                f"to parts of {MOST_PARTS:,}; give it more weight, or leave it out"
            )
    sources = {
        folder.fingerprint: {
            "name": folder.name,
            "parts": part,
            "epochs": folder.epochs,
            "samples": samples_in(folder.train.tokens, sequence_length),
        }
        for folder, part in zip(folders, parts, strict=True)
    }
    return {**found, "mixture": [{"first_sample": 0, "sources": sources}]}


def rounded(folders: Sequence[Folder]) -> str | None:
    """A line on weights that were rounded to parts of a period; None: they were not."""
    if parts_of([folder.weight for folder in folders])[1]:
        return None
    return f"the weights of data.mixture are rounded to parts of {MOST_PARTS:,}"


def is_mixed(data: Mapping[str, Any]) -> bool:
    """Whether data are, or have been, a mixture."""
    return "mixture" in data


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The mixture before and now, in words, where they differ in sources, weights or epochs."""
    first, second = _segments(before)[-1]["sources"], _segments(now)[-1]["sources"]
    if _told(first) == _told(second):
        return None
    texts = _shown(first, False), _shown(second, False)
    return texts if texts[0] != texts[1] else (_shown(first, True), _shown(second, True))


def gone_on(
    before: Mapping[str, Any], now: Mapping[str, Any], samples: int, sequence_length: int
) -> dict[str, Any]:
    """What identifies the data of a run that goes on with a mixture.

    Args:
        before: of its checkpoint.
        now: that of which it is to be from now on, as if it began; a mixture, also of one.
        samples: that were read before.
        sequence_length: tokens of each.
    """
    history, sources = _segments(before, sequence_length), now["mixture"][-1]["sources"]
    if changed(before, now) is None:
        samples = history[-1]["first_sample"]  # since when they are as they are
    kept = [segment for segment in history if segment["first_sample"] < samples]
    return {**now, "mixture": [*kept, {"first_sample": samples, "sources": sources}]}


def ordered(data: Mapping[str, Any], seed: int, samples: int) -> Ordered:
    """The order of a mixture.

    Args:
        data: as above, with a mixture.
        seed: of the run.
        samples: of the whole run.
    """
    segments = _segments(data)
    latest = {print_: source for each in segments for print_, source in each["sources"].items()}
    prints = sorted(latest)
    lengths = [latest[print_]["samples"] for print_ in prints]
    order = Mixture(lengths, [_segment(each, prints) for each in segments], seed, samples)
    now = segments[-1]["sources"]
    shown = [prints.index(one) for one in [*now, *(one for one in latest if one not in now)]]
    return Ordered(prints, _names(latest, now), lengths, order, shown)


def _segment(segment: Mapping[str, Any], prints: Sequence[str]) -> Segment:
    sources = [segment["sources"].get(print_) for print_ in prints]
    limits = [
        None if one is None or one["epochs"] is None else one["epochs"] * one["samples"]
        for one in sources
    ]
    parts = [0 if one is None else one["parts"] for one in sources]
    return Segment(segment["first_sample"], tuple(parts), tuple(limits))


def _names(latest: Sources, now: Sources) -> list[str]:
    """Of all sources in the order of their fingerprints; one of before may be called as one now."""
    taken = {source["name"] for source in now.values()}
    return [
        f"{source['name']}-{print_[:6]}"
        if print_ not in now and source["name"] in taken
        else source["name"]
        for print_, source in sorted(latest.items())
    ]


def _segments(data: Mapping[str, Any], sequence_length: int = 1) -> list[dict[str, Any]]:
    """Of one folder, the mixture of it alone."""
    if is_mixed(data):
        found: list[dict[str, Any]] = data["mixture"]
        return found
    length = max(1, samples_in(data.get("train_tokens", 0), sequence_length))
    alone = {"name": "data", "parts": 1, "epochs": None, "samples": length}
    return [{"first_sample": 0, "sources": {data.get("fingerprint", ""): alone}}]


def _told(sources: Sources) -> dict[str, list[Any]]:
    return {print_: [one[key] for key in _TOLD_BY] for print_, one in sources.items()}


def _shown(sources: Sources, prints: bool) -> str:
    size = sum(source["parts"] for source in sources.values())
    words = []
    for print_, source in sources.items():
        most = "" if source["epochs"] is None else f", at most {source['epochs']} times"
        of = f" ({print_[:8]})" if prints else ""
        words.append(f"{source['parts'] / size:.4g} {source['name']}{of}{most}")
    return "; ".join(words)
