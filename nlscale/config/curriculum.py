"""The stages of a run: sequences a step and tokens a sequence, from which step on. No torch.

`train.global_batch` may be a list of sizes, and `data.stages` give sequences another length; both
cut the run into stages, within which all steps are alike. Everything that counts samples or tokens
of a run asks here. A run without either is one stage. Another mixture, which `data.stages` may give
as well, makes no stage of its own: `mixture_starts`.

Samples are numbered over the run. Sequences of another length are another cut of the data, whose
samples have an order of their own: the first stage of a length begins that at 0, and each later one
of the same length goes on where the last one stopped, so that within a cut every sample of an epoch
is read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nlscale.config.period_warmup import CriticalBatch, PeriodWarmupConfig
from nlscale.config.schema import where
from nlscale.config.units import Start
from nlscale.config.vocabulary import BatchStage, Config, DataStage, SourceConfig
from nlscale.errors import UserError

_MOST_STEPS = 10**15


@dataclass(frozen=True)
class TrainingStage:
    """Steps of a run that are alike."""

    first_step: int
    """Steps of the run before its first."""
    steps: int
    first_sample: int
    """Samples of the run before its first: the global number of that."""
    first_token: int
    """Tokens of the run before its first."""
    global_batch: int
    """Sequences a step, over all ranks."""
    sequence_length: int
    """Tokens a sequence."""
    cut: int = 0
    """Of the data, in which its samples are numbered: 0 for the first length of the run, 1 for the
    next one that is another, and so on."""
    first_of_cut: int = 0
    """Number of its first sample in that cut."""

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence_length

    @property
    def tokens(self) -> int:
        """Of all its steps."""
        return self.steps * self.tokens_per_step

    def number_in_cut(self, sample: int) -> int:
        """Of a sample of the stage, by its global number, the number in its cut."""
        return self.first_of_cut + sample - self.first_sample

    def __str__(self) -> str:
        """Such as "from step 801: 64 sequences of 4096 tokens"."""
        return (
            f"from step {self.first_step + 1:,}: {self.global_batch:,} sequences of "
            f"{self.sequence_length:,} tokens"
        )


def curriculum(config: Config, sources: Mapping[str, str] | None = None) -> list[TrainingStage]:
    """The stages of a run, in their order; together they have all its steps.

    Args:
        config: of the run.
        sources: where each key was read, for errors.

    Raises:
        UserError: a place in the run that is none, out of order, or at its end; which key.
    """
    steps, data, given = config.train.steps, config.data, config.train.global_batch
    sources = sources or {}
    sizes, tokens = {0: given if isinstance(given, int) else 0}, {0: data.sequence_length}
    if not isinstance(given, int):
        begins = places("train.global_batch", given, steps, sources)
        if not begins or begins[0]:
            raise UserError(
                f"train.global_batch: no stage begins with the run; the first is such as "
                f"{{from: 0%, size: 32}}{where('train.global_batch', sources)}"
            )
        sizes = {place: entry.size for place, entry in zip(begins, given, strict=True)}
    for index, place in enumerate(places("data.stages", data.stages, steps, sources)):
        entry, key = data.stages[index], f"data.stages.{index}"
        length = entry.sequence_length
        if length is None and not entry.mixture:
            raise UserError(
                f"{key} changes nothing; give its sequence_length or a mixture, or leave it out"
                f"{where(key, sources)}"
            )
        if place and length == _at(tokens, place) and not entry.mixture:
            raise UserError(
                f"{key} changes nothing: sequences have {length:,} tokens before it; give another "
                f"sequence_length or a mixture, or leave it out{where(key, sources)}"
            )
        if place == 0:
            fix = (
                "give its data.mixture" if length is None else f"set data.sequence_length={length}"
            )
            raise UserError(
                f"{key}.from: it begins with the run, whose data are those of the section itself; "
                f"{fix}{where(f'{key}.from', sources)}"
            )
        if length is not None:
            tokens[place] = length
    changes = sorted({*sizes, *tokens})
    return _numbered(
        [
            (first, end - first, _at(sizes, first), _at(tokens, first))
            for first, end in zip(changes, [*changes[1:], steps], strict=True)
        ]
    )


def mixture_starts(config: Config) -> list[int]:
    """The steps of a run that come before each of its mixtures, of which the first begins it.

    Another mixture does not make another stage, all of whose steps cost the same.
    """
    later = [Start.parse(entry.from_) for entry in config.data.stages if entry.mixture]
    return [0, *(start.in_steps(config.train.steps) for start in later)]


def stage_of(stages: Sequence[TrainingStage], step: int) -> TrainingStage:
    """The stage of a step, counted from 1; of steps after the end, the last."""
    return next(s for s in reversed(stages) if s.first_step < step)


def samples_until(stages: Sequence[TrainingStage], step: int) -> int:
    """Samples of the first steps of a run, dropped ones included."""
    stage = stage_of(stages, max(1, step))
    return stage.first_sample + (step - stage.first_step) * stage.global_batch


def samples_of_cuts(stages: Sequence[TrainingStage], samples: int) -> list[int]:
    """Of the first samples of a run, how many are of each cut of the data."""
    counts = [0] * len(lengths(stages))
    ends = [*(stage.first_sample for stage in stages[1:]), samples]
    for stage, end in zip(stages, ends, strict=True):
        counts[stage.cut] += max(0, min(samples, end) - stage.first_sample)
    return counts


def step_of(stages: Sequence[TrainingStage], cut: int, count: int) -> int:
    """The step with which at least so many samples of a cut have been taken."""
    stage = next(
        s
        for s in reversed(stages)
        if s.cut == cut and (s.first_of_cut < count or not s.first_of_cut)
    )
    return stage.first_step - (stage.first_of_cut - count) // stage.global_batch


def tokens_until(stages: Sequence[TrainingStage], step: int) -> int:
    """Tokens of the first steps of a run, dropped ones included."""
    stage = stage_of(stages, max(1, step))
    return stage.first_token + (step - stage.first_step) * stage.tokens_per_step


def total_tokens(config: Config) -> int:
    """Tokens of all steps of a run."""
    return sum(stage.tokens for stage in curriculum(config))


def lengths(stages: Sequence[TrainingStage]) -> list[int]:
    """Tokens a sequence in each cut of the data."""
    return list(dict.fromkeys(stage.sequence_length for stage in stages))


def largest(config: Config) -> TrainingStage:
    """The stage with the longest sequences, and of those the one with most of them a step."""
    return max(curriculum(config), key=lambda stage: (stage.sequence_length, stage.global_batch))


def tokens_per_step(config: Config) -> int | None:
    """Tokens of a step; None: they differ between the stages of the run."""
    found = {stage.tokens_per_step for stage in curriculum(config)}
    return found.pop() if len(found) == 1 else None


def at_stage(config: Config, stage: TrainingStage) -> Config:
    """The same run with steps that are all those of one stage, at the periods of the spectrum."""
    return replace(
        config,
        levels=replace(config.levels, period_warmup=PeriodWarmupConfig()),
        train=replace(config.train, global_batch=stage.global_batch),
        data=replace(config.data, sequence_length=stage.sequence_length, stages=[]),
    )


def steps_for(config: Config, tokens: int) -> int:
    """The length of a run whose tokens come nearest to a number of them, whatever its own is.

    It may be one that is too short for stages which begin after a number of steps.
    """

    def of(steps: int) -> int:
        """0 where the run is too short for its stages."""
        try:
            return total_tokens(replace(config, train=replace(config.train, steps=steps)))
        except UserError:
            return 0

    least = min(stage.tokens_per_step for stage in curriculum(config))
    low, high = 0, -(-tokens // least)
    while of(high) < tokens:  # stages that begin after so many steps
        low, high = high, 2 * high
        if high > _MOST_STEPS:
            return -(-tokens // least)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if of(middle) >= tokens else (middle, high)
    return high if of(high) - tokens <= tokens - of(low) else low


def alike_until(config: Config, steps: int) -> int:
    """The first steps of a run of that many that take the same samples in any longer run.

    They end where the first stage begins that is given as a share of the run.
    """
    given = config.train.global_batch
    batches = [] if isinstance(given, int) else given
    given_as = [*(entry.from_ for entry in batches), *(entry.from_ for entry in config.data.stages)]
    starts = map(Start.parse, given_as)
    shares = [start.in_steps(steps) for start in starts if start.unit == "%"]
    return min([steps, *filter(None, shares)])


def of_plain(saved: Mapping[str, Any]) -> list[TrainingStage]:
    """The stages of a run whose configuration was saved as plain dicts and lists."""
    data, train, config = saved["data"], saved["train"], Config()
    given = train["global_batch"]
    config.train.steps = train["steps"]
    config.train.global_batch = (
        given
        if isinstance(given, int)
        else [BatchStage(from_=entry["from"], size=entry["size"]) for entry in given]
    )
    config.data.sequence_length = data["sequence_length"]
    length = config.data.sequence_length
    for entry in data.get("stages", []):
        mixture = [SourceConfig(dir=source["dir"]) for source in entry.get("mixture", [])]
        # an earlier version took one that changes nothing
        if mixture or entry["sequence_length"] != length:
            stage = DataStage(entry["from"], entry["sequence_length"], mixture)
            config.data.stages.append(stage)
        length = entry["sequence_length"] or length
    return curriculum(config)


def places(
    key: str,
    entries: Sequence[BatchStage | DataStage | CriticalBatch],
    steps: int,
    sources: Mapping[str, str],
) -> list[int]:
    """The steps of a run that come before each entry of a list, in which they must rise.

    Raises:
        UserError: a place that is none, out of order, or at the end of the run; which key.
    """
    found: list[int] = []
    for index, entry in enumerate(entries):
        at = f"{key}.{index}.from"
        try:
            place = Start.parse(entry.from_).in_steps(steps)
        except UserError as error:
            raise UserError(f"{at}: {error}{where(at, sources)}") from None
        if place >= steps:
            raise UserError(
                f"{at}: {entry.from_!r} is not before the end of a run of {steps:,} steps; begin "
                f"earlier, or give more train.steps{where(at, sources)}"
            )
        if found and place <= found[-1]:
            raise UserError(
                f"{at}: {entry.from_!r} is after {place:,} of {steps:,} steps, and the one "
                f"before it begins after {found[-1]:,}; let each begin later than the one before"
                f"{where(at, sources)}"
            )
        found.append(place)
    return found


def _at(values: Mapping[int, int], step: int) -> int:
    """The value that holds after so many steps."""
    return values[max(first for first in values if first <= step)]


def _numbered(stages: list[tuple[int, int, int, int]]) -> list[TrainingStage]:
    """Stages of first step, steps, sequences and their length, with samples and tokens counted."""
    found: list[TrainingStage] = []
    samples = tokens = 0
    of_cut: dict[int, int] = {}
    """Samples so far by the length of their sequences, in the order of the cuts."""
    for first, steps, batch, length in stages:
        before = of_cut.setdefault(length, 0)
        cut = list(of_cut).index(length)
        found.append(TrainingStage(first, steps, samples, tokens, batch, length, cut, before))
        of_cut[length] += steps * batch
        samples += steps * batch
        tokens += found[-1].tokens
    return found
