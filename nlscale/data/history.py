"""What identifies the data of a run, and of a mixture its weights from the first sample on.

In the form in which a checkpoint keeps it. Of one folder, `data.dir`:

    {"fingerprint": "ab12...", "train_tokens": 1000000, "tokenizer": "bytes sha256:..."}

and of a mixture also

    "mixture": {"plan": [SOURCES, ...], "segments": [{"cut": 0, "first_sample": 0,
                "sources": SOURCES}, ...]}

where SOURCES are {"ab12...": {"name": "web", "parts": 3, "epochs": null, "tokens": 1000000}, ...}.
The plan is what the configuration mixes, one mixture after another as stages give them, and tells
one run from another. The segments say from which number of each cut of the data on
(`nlscale.config.curriculum`) which weights have held or will: of a plan that was changed on
resuming they begin with those of before.

Sources are recognised by their fingerprints, whatever they are called and wherever they lie; the
order is a function of these segments, the seed and the number of a sample in its cut. One folder is
the mixture of one source.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlscale.config.curriculum import (
    curriculum,
    lengths,
    mixture_starts,
    samples_of_cuts,
    samples_until,
    stage_of,
)
from nlscale.config.data_sources import mixtures_of
from nlscale.config.vocabulary import Config
from nlscale.data.apportion import MOST_PARTS, parts_of
from nlscale.data.folders import Folder
from nlscale.data.index import tokenizer_of
from nlscale.data.mixture import Mixture, Segment
from nlscale.data.order import seed_of_cut
from nlscale.data.reader import samples_in
from nlscale.errors import UserError

Sources = Mapping[str, Mapping[str, Any]]
"""Of a segment: what is said of each source, by fingerprint."""
_TOLD_BY = ("parts", "epochs")
"""Of a source, what the order follows from, beside the data."""


@dataclass(frozen=True)
class CutOrder:
    """The order in a cut of the data, in which samples have numbers of their own."""

    sequence_length: int
    lengths: list[int]
    """Samples of an epoch of each source."""
    order: Mixture


@dataclass(frozen=True)
class Ordered:
    """The sources that a run has read or will, and the order in which it does."""

    fingerprints: list[str]
    """By the place of a source in the orders."""
    names: list[str]
    """The same; no two alike."""
    shown: list[int]
    """Places in the order of the recipe, and then those that are read no more."""
    cuts: list[CutOrder]
    """Of each cut of the data."""
    beyond: int = 0
    """See `samples_beyond`, of where the run stands."""

    def read(self, samples: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
        """Tokens and epochs of each source in the first samples of each cut; None: in all."""
        counts = self.counts([cut.order.end for cut in self.cuts] if samples is None else samples)
        places = range(len(self.names))
        of = list(zip(counts, self.cuts, strict=True))
        tokens = [sum(count[i] * cut.sequence_length for count, cut in of) for i in places]
        return tokens, [sum(count[i] / cut.lengths[i] for count, cut in of) for i in places]

    def counts(self, samples: Sequence[int]) -> list[list[int]]:
        """Samples of each source in the first samples of each cut, as far as its order goes."""
        each = zip(self.cuts, samples, strict=True)
        return [cut.order.counts(min(count, cut.order.end)).tolist() for cut, count in each]


def identity(folders: Sequence[Folder], config: Config, mixed: bool) -> dict[str, Any]:
    """What identifies the data of a run that begins.

    Args:
        folders: of the run.
        config: of the run.
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
    keys = list(mixtures_of(config.data)) or ["data.dir"]
    plan = [_planned(folders, number, key) for number, key in enumerate(keys)]
    return {
        **found,
        "mixture": {"plan": plan, "segments": _joined(_to_come(plan, config, 0, 0))},
    }


def _planned(folders: Sequence[Folder], number: int, key: str) -> dict[str, Any]:
    """The sources of a mixture of the run."""
    own = [folder for folder in folders if folder.weights[number]]
    weights = [folder.weights[number] for folder in own]
    parts, _ = parts_of(weights)
    for folder, part in zip(own, parts, strict=True):
        if not part:
            share = float(folder.weights[number] / sum(weights))
            raise UserError(
                f"{key}: the share of {folder.name} is {share:.2g}, and shares are rounded "
                f"to parts of {MOST_PARTS:,}; give it more weight, or leave it out"
            )
    return {
        folder.fingerprint: {
            "name": folder.name,
            "parts": part,
            "epochs": folder.epochs[number],
            "tokens": folder.train.tokens,
        }
        for folder, part in zip(own, parts, strict=True)
    }


def rounded(folders: Sequence[Folder]) -> str | None:
    """A line on weights that were rounded to parts of a period; None: they were not."""
    mixtures = zip(*(folder.weights for folder in folders), strict=True)
    if all(parts_of(list(filter(None, weights)))[1] for weights in mixtures):
        return None
    return f"the weights of data.mixture are rounded to parts of {MOST_PARTS:,}"


def without_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """What data are, whatever their sources are called: a name may be the last part of a folder."""
    if not is_mixed(data):
        return dict(data)
    plan, segments = data["mixture"]["plan"], data["mixture"]["segments"]
    nameless = [{**each, "sources": _nameless(each["sources"])} for each in segments]
    return {**data, "mixture": {"plan": list(map(_nameless, plan)), "segments": nameless}}


def _nameless(sources: Sources) -> dict[str, Any]:
    return {
        print_: {key: value for key, value in source.items() if key != "name"}
        for print_, source in sources.items()
    }


def is_mixed(data: Mapping[str, Any]) -> bool:
    """Whether data are, or have been, a mixture."""
    return "mixture" in data


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The mixtures before and now, in words, where they differ in sources, weights or epochs."""
    first, second = _plan(before), _plan(now)
    if list(map(_told, first)) == list(map(_told, second)):
        return None
    texts = _shown(first, False), _shown(second, False)
    return texts if texts[0] != texts[1] else (_shown(first, True), _shown(second, True))


def gone_on(
    before: Mapping[str, Any], now: Mapping[str, Any], config: Config, step: int, samples: int
) -> dict[str, Any]:
    """What identifies the data of a run that goes on with a mixture.

    Args:
        before: of its checkpoint.
        now: that of which it is to be from now on, as if it began; a mixture, also of one.
        config: of the run.
        step: steps that were taken before.
        samples: that were read before.
    """
    stages = curriculum(config)
    read = dict(enumerate(samples_of_cuts(stages, samples)))
    if is_mixed(before):
        history = before["mixture"]["segments"]
    else:
        (alone,) = _plan(before)
        history = [{"cut": cut, "first_sample": 0, "sources": alone} for cut in read]
    found = [
        segment for segment in history if segment["first_sample"] < read.get(segment["cut"], 0)
    ]
    plan = now["mixture"]["plan"]
    segments = _joined([*found, *_to_come(plan, config, step, samples)])
    return {**now, "mixture": {"plan": plan, "segments": segments}}


def samples_beyond(config: Config, step: int, samples: int) -> int:
    """How many more samples so many steps have read than the stages of a run say.

    That is 0, unless another batch was allowed on resuming a run of one sequence length; samples
    go on from the next number, and all that is planned comes at others.
    """
    return samples - samples_until(curriculum(config), step)


def _to_come(
    plan: Sequence[Sources], config: Config, step: int, samples: int
) -> list[dict[str, Any]]:
    """The segments of a plan from where a run stands on, after so many steps and samples."""
    stages, starts = curriculum(config), mixture_starts(config)
    beyond = samples_beyond(config, step, samples)
    begins = sorted({*(stage.first_step for stage in stages), *starts})
    found: list[dict[str, Any]] = []
    for begin, end in zip(begins, [*begins[1:], config.train.steps], strict=True):
        if end > step:
            first = max(begin, step)
            stage = stage_of(stages, first + 1)
            number = stage.number_in_cut(samples_until(stages, first) + beyond)
            sources = plan[bisect_right(starts, begin) - 1]
            found.append({"cut": stage.cut, "first_sample": number, "sources": sources})
    return found


def _joined(segments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Segments without those that say what the one before them in their cut does."""
    found: list[dict[str, Any]] = []
    latest: dict[int, Sources] = {}
    """By cut."""
    for segment in segments:
        cut, sources = segment["cut"], segment["sources"]
        if cut not in latest:
            found.append({**segment, "first_sample": 0})
        elif _told(latest[cut]) != _told(sources):
            found.append(segment)
        latest[cut] = sources
    return found


def ordered(data: Mapping[str, Any], config: Config, beyond: int = 0) -> Ordered:
    """The order of a mixture over a run.

    Args:
        data: as above, with a mixture.
        config: of the run.
        beyond: see `samples_beyond`, of where the run stands.
    """
    plan, segments = data["mixture"]["plan"], data["mixture"]["segments"]
    every = [*(each["sources"] for each in segments), *plan]
    latest = {print_: source for each in every for print_, source in each.items()}
    now = {print_: source for each in plan for print_, source in each.items()}
    prints, stages, seed = sorted(latest), curriculum(config), config.run.seed
    samples = samples_of_cuts(stages, samples_until(stages, config.train.steps) + beyond)
    cuts = []
    for cut, length in enumerate(lengths(stages)):
        # of a source too short for a sample that is read all the same, the reader says so
        epochs = [max(1, samples_in(latest[print_]["tokens"], length)) for print_ in prints]
        own = [_segment(each, prints, epochs) for each in segments if each["cut"] == cut]
        order = Mixture(epochs, own, seed_of_cut(seed, cut), samples[cut])
        cuts.append(CutOrder(length, epochs, order))
    shown = [prints.index(one) for one in [*now, *(one for one in latest if one not in now)]]
    return Ordered(prints, _names(latest, now), shown, cuts, beyond)


def _segment(segment: Mapping[str, Any], prints: Sequence[str], lengths: Sequence[int]) -> Segment:
    sources = [segment["sources"].get(print_) for print_ in prints]
    limits = [
        None if one is None or one["epochs"] is None else one["epochs"] * length
        for one, length in zip(sources, lengths, strict=True)
    ]
    parts = [0 if one is None else one["parts"] for one in sources]
    return Segment(segment["first_sample"], tuple(parts), tuple(limits))


def _names(latest: Sources, now: Sources) -> list[str]:
    """Of all sources in the order of their fingerprints; those of before may be called as others.

    Those of now are not alike.
    """
    count = Counter(source["name"] for source in latest.values())
    return [
        f"{source['name']}-{print_[:6]}"
        if print_ not in now and count[source["name"]] > 1
        else source["name"]
        for print_, source in sorted(latest.items())
    ]


def _plan(data: Mapping[str, Any]) -> list[Sources]:
    """Of one folder, the mixture of it alone."""
    if is_mixed(data):
        found: list[Sources] = data["mixture"]["plan"]
        return found
    tokens = data.get("train_tokens", 0)
    alone = {"name": "data", "parts": 1, "epochs": None, "tokens": tokens}
    return [{data.get("fingerprint", ""): alone}]


def _told(sources: Sources) -> dict[str, list[Any]]:
    return {print_: [one[key] for key in _TOLD_BY] for print_, one in sources.items()}


def _shown(plan: Sequence[Sources], prints: bool) -> str:
    return ", then ".join(_mixture_shown(sources, prints) for sources in plan)


def _mixture_shown(sources: Sources, prints: bool) -> str:
    size = sum(source["parts"] for source in sources.values())
    words = []
    for print_, source in sources.items():
        most = "" if source["epochs"] is None else f", at most {source['epochs']} times"
        of = f" ({print_[:8]})" if prints else ""
        words.append(f"{source['parts'] / size:.4g} {source['name']}{of}{most}")
    return "; ".join(words)
