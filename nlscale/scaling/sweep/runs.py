"""From a sweep file to its runs: the product of the axes, sizes, lengths and FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlscale.config import recipe, trees
from nlscale.config.curriculum import curriculum, steps_for, tokens_per_step, total_tokens
from nlscale.config.urls import is_url
from nlscale.config.vocabulary import Config
from nlscale.data import read_index
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.model.flops import mean_flops_per_token, steps_flops
from nlscale.model.sizes import level_parameters, non_embedding_parameters
from nlscale.plan.checks import check_sizes
from nlscale.scaling.compare.runs import keys_of, same
from nlscale.scaling.sweep.build_data import require_data, vocabulary_to_be
from nlscale.scaling.sweep.spec import Sweep
from nlscale.scaling.sweep.values import Budget, Value
from nlscale.train.prepare import prepare

_MOST_STEPS = 10**15


@dataclass
class Run:
    """One run of a sweep."""

    name: str
    axes: dict[str, str]
    """The name of its value on each axis."""
    config: Config
    vocabulary: int
    parameters: int
    non_embedding: int
    flops_per_token: float
    """Forward and backward, the mean over its steps."""
    start: Run | None = None
    """The run whose stable phase it shares."""
    start_step: int = 0
    """The step of that run at which it begins."""
    chain: str = ""
    """The same for all runs that differ in length alone."""
    branches: list[Run] = field(default_factory=list)
    """The runs that begin from this one."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def tokens(self) -> int:
        """Tokens that its last model has been trained on."""
        return total_tokens(self.config)

    @property
    def flops(self) -> float:
        """FLOPs that it has to do itself: what it shares is counted in the run it begins from."""
        return self.flops_until(self.steps)

    def flops_until(self, step: int) -> float:
        """FLOPs that it has done itself after that step."""
        return steps_flops(self.config, self.vocabulary, self.start_step, step)


def expand(
    sweep: Sweep,
    assumed: int | None = None,
    wanted: Callable[[Mapping[str, str]], bool] = lambda axes: True,
) -> list[Run]:
    """The runs of a sweep, in the order of its axes, the last one fastest.

    Args:
        sweep: as read.
        assumed: the vocabulary of runs of which nobody knows it yet; None: that is an error.
        wanted: whether a run is one, by the names of its values.

    Raises:
        UserError: a run's configuration is wrong (which run, and what), or a vocabulary is neither
            in the recipe nor, because the data are missing and build_data is no task, known.
    """
    runs: list[Run] = []
    vocabularies: dict[str, int] = {}
    for name, axes, values in combinations(sweep, wanted):
        try:
            run = _run(sweep, name, axes, list(values), vocabularies, assumed)
            check_sizes(run.config, sweep.ranks)
            levels_of(run.config)
        except UserError as error:
            said = str(error).replace(" (the command line)", "")
            raise UserError(f"{sweep.path}: run {name}: {said}") from None
        runs.append(run)
    return runs


def combinations(
    sweep: Sweep, wanted: Callable[[Mapping[str, str]], bool]
) -> Iterator[tuple[str, dict[str, str], tuple[Value, ...]]]:
    """Of each run that is wanted its name, the names of its values by axis, and the values."""
    for values in itertools.product(*sweep.axes.values()):
        name = "-".join(value.name for value in values)  # unique: no part has a dash
        axes = {axis: v.name for axis, v in zip(sweep.axes, values, strict=True)}
        if wanted(axes):
            yield name, axes, values


def check_data(sweep: Sweep, runs: list[Run]) -> list[str]:
    """Open the data of every run, as it will itself; a line for each that reads them repeatedly.

    Raises:
        UserError: they are missing, of another size or do not fit; which run, and what.
    """
    lines = []
    for run in runs:
        for folder in run.config.data.folders():
            require_data(sweep, folder)
        try:
            prepared = prepare(run.config)
        except UserError as error:
            raise UserError(f"{sweep.path}: run {run.name}: {error}") from None
        for what, epochs in prepared.epochs(run.tokens).items():
            if epochs > 1:
                lines.append(f"{run.name} reads {what} {epochs:.1f} times")
    return lines


def check_question(sweep: Sweep, runs: list[Run]) -> None:
    """Refuse to ask at the end for what the runs do not measure, or that none of them is.

    Raises:
        UserError: the metric is of an evaluation that a run does not make, or no run has the value
            that the others are to be compared with.
    """
    question = sweep.compare
    if question is None:
        return
    kind, _, rest = question.metric.partition(".")
    name = rest.partition(".")[0]
    for run in runs:
        if kind == "evaluation" and name not in run.config.evaluate:
            raise UserError(
                f"{sweep.path}: compare.metric is {question.metric}, and {run.name} evaluates "
                f"{', '.join(run.config.evaluate) or 'nothing'}; set evaluate: [{name}]"
            )
    for key, value in question.baselines.items():
        there = {keys_of(run.config).get(key, "null") for run in runs}
        if not any(same(value, other) for other in there):
            raise UserError(
                f"{sweep.path}: compare.baseline: no run has {key}={value}; there are "
                f"{', '.join(sorted(there))}"
            )


def _run(
    sweep: Sweep,
    name: str,
    axes: dict[str, str],
    values: list[Value],
    known: dict[str, int],
    assumed: int | None,
) -> Run:
    keys = dict(sweep.common)
    for value in values:
        keys |= value.keys
    keys["run.dir"] = str(sweep.folder / name)
    first = dict(keys)
    config = _load(sweep, first)
    if config.checkpoint.mirror is not None:  # a mirror is of one run
        keys["checkpoint.mirror"] = f"{config.checkpoint.mirror.rstrip('/')}/{name}"
    vocabulary = config.model.vocabulary or _vocabulary(sweep, config, known, assumed)
    for value in values:
        if sweep.ladder and value.target:
            keys |= sweep.ladder.rung(value.name, value.target, vocabulary)
    if keys != first or config.model.vocabulary != vocabulary:
        config = _load(sweep, keys | {"model.vocabulary": vocabulary})
    parameters = sum(level_parameters(config, vocabulary))
    for value in values:
        if value.budget:
            config.train.steps = _steps(value.budget, parameters, config)
    config.train.steps = max(1, round(sweep.share * config.train.steps))
    return Run(
        name=name,
        axes=axes,
        config=config,
        vocabulary=vocabulary,
        parameters=parameters,
        non_embedding=non_embedding_parameters(config, vocabulary),
        flops_per_token=mean_flops_per_token(config, vocabulary),
    )


def _load(sweep: Sweep, keys: dict[str, Any]) -> Config:
    overrides = [f"{key}={trees.dump(value)}" for key, value in keys.items()]
    return recipe.load(sweep.recipe, overrides, trusted=True).config


def _steps(budget: Budget, parameters: int, config: Config) -> int:
    tokens = budget.tokens or round((budget.per_parameter or 0) * parameters)
    first, per_step = curriculum(config)[0], tokens_per_step(config)
    if tokens < first.tokens_per_step:
        raise UserError(
            f"{tokens:,} tokens are less than one step of {first.tokens_per_step:,} "
            f"(train.global_batch {first.global_batch} x data.sequence_length "
            f"{first.sequence_length})"
        )
    steps = round(tokens / per_step) if per_step else steps_for(config, tokens)
    if steps > _MOST_STEPS:
        raise UserError(f"{tokens:,} tokens are {steps:,} steps; at most {_MOST_STEPS:,} can be")
    return steps


def _vocabulary(sweep: Sweep, config: Config, known: dict[str, int], assumed: int | None) -> int:
    folder = config.data.folders()[0]  # sources of a mixture have one tokenizer
    if folder not in known:
        try:
            require_data(sweep, folder)
            known[folder] = read_index(folder)["vocabulary"]
        except UserError:
            found = (
                None if is_url(folder) or Path(folder).exists() else vocabulary_to_be(sweep, folder)
            )
            found = found or (assumed and (_seen_vocabulary(sweep, folder) or assumed))
            if found is None:
                raise
            return found
    return known[folder]


def _seen_vocabulary(sweep: Sweep, data: str) -> int | None:
    """That of those data, as a run of the sweep that has begun says; None: none has."""
    for written in sorted(sweep.folder.glob("*/config.yaml")):
        with suppress(UserError):
            config = recipe.load(written).config
            if data in config.data.folders() and config.model.vocabulary:
                return config.model.vocabulary
    return None
