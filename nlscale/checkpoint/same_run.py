"""Is a configuration the run that was begun, or another one. No torch is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlscale.config import recipe
from nlscale.config.curriculum import (
    TrainingStage,
    alike_until,
    curriculum,
    lengths,
    of_plain,
    samples_of_cuts,
    samples_until,
)
from nlscale.config.periods import periods_alike_until
from nlscale.config.vocabulary import BlockMixerConfig, Config, Part
from nlscale.data.history import changed as changed_mixture
from nlscale.data.history import is_mixed
from nlscale.errors import UserError
from nlscale.optim.schedule import stable_steps

_FREE = (
    "run.dir",
    "run.max_restarts",
    "run.weights",
    "run.imports",
    "data.dir",
    "data.cache.",
    "data.mixture",
    "data.temperature",
    "data.stages.N.mixture",
    "levels.spectrum.N.memory",
    "tiers.",
    "parallel.",
    "timeouts.",
    "checkpoint.",
    "resume.",
    "evaluate",
    "wandb.",
    "train.micro_batch",
    "train.recompute",
    "train.kernels",
    "train.validate_every",
    "train.validation_sequences",
    "train.max_dropped_steps",
)
"""What may differ without asking: where and how fast a run goes, not where to. The data are
compared by what they are, and a mixture by the order that it makes of them."""


TOKENIZER = "data.tokenizer"
"""What `resume.allow` calls a tokenizer that is another one than that of the run that was begun."""

_PLANS = ("optimizer.", "train.global_batch", "data.stages", "levels.period_warmup")
"""What gives a step its learning rate, its samples and its windows."""


_PARTS = re.compile(r"levels\.spectrum\.\d+\.parts")


class OtherSettings(UserError):
    """The run that was saved had other settings, which nobody has allowed to differ."""


def check_same_run(config: Config, data: dict[str, Any], state: dict[str, Any], where: str) -> None:
    """Refuse to go on as another run than the one that was saved.

    Another length is the same run as long as no step so far has depended on it: in the warm-up and
    stable phase of wsd, before the first stage that begins at a share of the run, and before a
    period that follows from it.

    Args:
        config: of the run that wants to go on.
        data: what identifies its data.
        state: of the checkpoint.
        where: what to call the checkpoint.

    Raises:
        OtherSettings: one line for each key that differs and is not in `resume.allow`.
        UserError: `resume.allow` names no key; the state is damaged; samples were read at another
            sequence length than the stages of the configuration say; or it ends before the step
            of the checkpoint.
    """
    lacking = [key for key in ("config", "data") if not isinstance(state.get(key), dict)]
    if lacking:
        raise UserError(
            f"{where} is damaged: its state holds no {' and no '.join(lacking)}; give another "
            f"run.dir, or take that checkpoint away"
        )
    changed = changed_keys(config, state["config"]) | changed_data(data, state["data"])
    for key in sorted({*config.resume.allow} - {"data", TOKENIZER, *changed}):
        if not recipe.has_key(key):
            raise UserError(f"resume.allow: unknown key {key!r}")
    if "train.steps" in changed and _length_has_not_mattered(config, state, changed):
        del changed["train.steps"]
    refused = {key: values for key, values in changed.items() if key not in config.resume.allow}
    read_otherwise = _read_otherwise(config, state, where)
    if refused:
        lines = [f"  {key}: {before!r} -> {now!r}" for key, (before, now) in refused.items()]
        said = f"{where} is of a run with other settings:\n" + "\n".join(lines)
        if read_otherwise:
            raise UserError(f"{said}\n{read_otherwise}")
        raise OtherSettings(
            f"{said}\ngive another run.dir, or go on with the change: "
            f"'resume.allow=[{','.join(refused)}]'"
        )
    if read_otherwise:
        raise UserError(read_otherwise)
    taken = state.get("step", 0)
    if taken > config.train.steps:
        raise UserError(
            f"{where} has taken {taken:,} steps, and train.steps is {config.train.steps:,}; give "
            f"{taken:,} or more, or another run.dir with resume.start=... an earlier checkpoint"
        )


def changed_data(now: dict[str, Any], before: Any) -> dict[str, tuple[Any, Any]]:
    """What makes data others than those of a run that was saved: (before, now) by key.

    `data` where other data are read, `data.mixture` where they are mixed otherwise. Their tokenizer
    is a key of its own, `TOKENIZER`, as other text may be meant and other ids of the same text
    hardly are. Where one of both was written before it was recorded, it is the same.
    """
    if not isinstance(before, dict):
        return {"data": (before, now)}
    names = [data.get("tokenizer") for data in (before, now)]
    rest = [{k: v for k, v in data.items() if k != "tokenizer"} for data in (before, now)]
    changed: dict[str, tuple[Any, Any]] = {}
    if None not in names and names[0] != names[1]:
        changed[TOKENIZER] = (names[0], names[1])
    if is_mixed(now) or is_mixed(before):
        mixtures = changed_mixture(before, now)
        return changed if mixtures is None else {**changed, "data.mixture": mixtures}
    if rest[0] != rest[1]:
        changed["data"] = (rest[0], rest[1])
    return changed


def _read_otherwise(config: Config, state: dict[str, Any], where: str) -> str | None:
    """What to say where samples so far are not those of the stages of a configuration.

    Where the numbers in a cut of the data go on follows from the steps of its stages, so that
    another past would have samples read twice, or never. A run of one length goes on from the next
    sample, after an allowed change of the batch, too.
    """
    now = curriculum(config)
    before = of_plain(_completed(state["config"], recipe.to_plain(Config())))
    if len(lengths(now)) == len(lengths(before)) == 1:
        return None
    step = state.get("step", 0)
    samples = state.get("samples", samples_until(before, step))
    planned = samples if len(lengths(now)) == 1 else samples_until(now, step)
    was, would_be = _by_length(before, samples), _by_length(now, planned)
    if was == would_be:
        return None
    return (
        f"{where} has taken {_counted(was)} in {step:,} steps, and with the stages of this "
        f"configuration it would be {_counted(would_be)}; give the stages that have begun as they "
        f"were, their places in steps if train.steps changes, and let what changes begin after "
        f"{step:,} steps"
    )


def _by_length(stages: Sequence[TrainingStage], samples: int) -> list[tuple[int, int]]:
    """Tokens of a sample, and how many of the first samples are so long, in the order of cuts."""
    cuts = zip(lengths(stages), samples_of_cuts(stages, samples), strict=True)
    return [(length, count) for length, count in cuts if count]


def _counted(read: Sequence[tuple[int, int]]) -> str:
    shown = [f"{count:,} samples of {length:,} tokens" for length, count in read]
    return " and ".join(shown) or "no sample"


def changed_sources(config: Config, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """`data.mixture` where a run that has saved nothing yet was to mix other sources, or otherwise.

    Args:
        config: of the run that wants to begin.
        saved: of the one that was begun.
    """
    now, before = recipe.to_plain(config)["data"], saved.get("data") or {}
    mixtures = [_sources(data) for data in (before, now)]
    return {} if mixtures[0] == mixtures[1] else {"data.mixture": (mixtures[0], mixtures[1])}


def _sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """Weights and epochs by the name of a source, wherever it lies, and the temperature.

    Of the mixtures of stages by the number of the stage and the name.
    """
    later = [stage.get("mixture") or [] for stage in data.get("stages") or []]
    mixtures = {"": data.get("mixture") or []}
    mixtures |= {f"data.stages.{number}: ": mixture for number, mixture in enumerate(later)}
    each = {
        f"{of}{s['name'] or Path(s['dir']).name}": (s["weight"], s["epochs"])
        for of, mixture in mixtures.items()
        for s in mixture
    }
    return {**each, "temperature": data.get("temperature")} if each else {}


def changed_keys(config: Config, saved: Any) -> dict[str, tuple[Any, Any]]:
    """Keys that make a configuration another run than one that was saved as plain dicts.

    Args:
        config: of the run that wants to go on.
        saved: of the run that was begun; keys that came after it are at their defaults.

    Returns:
        (before, now) by dotted key.
    """
    defaults = recipe.to_plain(Config())
    model = saved.get("model") if isinstance(saved, dict) else None
    if isinstance(model, dict) and model.get("pattern"):
        defaults["model"]["pattern"] = [recipe.to_plain(BlockMixerConfig())]
    return differences(recipe.to_plain(config), _completed(saved, defaults))


def differences(now: Any, before: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys that make another run and differ: (before, now) by dotted key."""
    key = prefix.rstrip(".")
    if _PARTS.fullmatch(key):
        return {} if _parts(now) == _parts(before) else {key: (before, now)}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        now, before = dict(enumerate(now)), dict(enumerate(before))
    if isinstance(now, dict) and isinstance(before, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in [*before, *(key for key in now if key not in before)]:
            below = f"{prefix}{name}"
            if not _is_free(below):
                found |= differences(now.get(name), before.get(name), f"{below}.")
        return found
    return {} if now == before else {key: (before, now)}


def _parts(given: list[str] | None) -> set[str]:
    """Of a level, in whatever order they were given."""
    return {Part.cms.value} if given is None else set(given)


def _is_free(key: str) -> bool:
    plain = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return plain.startswith(_FREE) or f"{plain}.".startswith(_FREE)


def _completed(saved: Any, defaults: Any) -> Any:
    """A saved configuration with the keys that came after it: their defaults change nothing.

    Those of each entry of a list, too, such as a level: the default list has an entry.
    """
    if isinstance(saved, list) and isinstance(defaults, list) and defaults:
        return [_completed(entry, defaults[0]) for entry in saved]
    if not isinstance(saved, dict) or not isinstance(defaults, dict):
        return saved
    return defaults | {key: _completed(value, defaults.get(key)) for key, value in saved.items()}


def _length_has_not_mattered(
    config: Config, state: dict[str, Any], changed: dict[str, tuple[Any, Any]]
) -> bool:
    if any(key.startswith(_PLANS) for key in changed):
        return False  # the steps so far had another schedule or batch than this configuration's
    return bool(state["step"] <= stable_end(config, changed["train.steps"]))


def stable_end(config: Config, lengths: Sequence[int]) -> int:
    """The last step that is the same in a run of any of these lengths, in steps, and a longer."""
    return min(
        min(
            stable_steps(config.optimizer, steps),
            alike_until(config, steps),
            periods_alike_until(config, steps),
        )
        for steps in lengths
    )
