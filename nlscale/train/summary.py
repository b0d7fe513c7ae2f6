"""What a run says of itself: at its start, of its levels at each step, and at its end."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from nlscale.checkpoint.saver import saves
from nlscale.config.curriculum import samples_of_cuts, tokens_until
from nlscale.config.parts import parts_of
from nlscale.config.vocabulary import Config, mixer_label
from nlscale.errors import Stopped
from nlscale.levels.engine import LevelOptimizer
from nlscale.levels.notes import why_approximate
from nlscale.levels.spectrum import Level, periods_to_plain, said_periods
from nlscale.model.flops import mean_flops_per_token
from nlscale.model.sizes import level_parameters, non_embedding_parameters
from nlscale.parallel.consensus import Verdict
from nlscale.parallel.layout import Layout
from nlscale.step.trainer import Trainer
from nlscale.train.costs import Costs
from nlscale.train.mixed import unigram_bits_per_byte
from nlscale.train.prepare import Prepared

_STANDS_STILL = 1e-7


def describe(config: Config, prepared: Prepared, layout: Layout) -> str:
    """The run in a line."""
    parameters = level_parameters(config, prepared.vocabulary)
    spectrum = ", ".join(
        f"{level.name} every {_periods(level)}{_outer(level)} ({count / 1e6:.2f}M)"
        for level, count in zip(prepared.levels, parameters, strict=True)
    )
    mixer = mixer_label(config.model)
    return (
        f"{mixer}, {sum(parameters) / 1e6:.2f}M parameters; levels: {spectrum}; "
        f"{layout.world} rank{'s' * (layout.world > 1)} on {layout.device.type}, "
        f"{config.train.dtype.value}, {_tokens_a_step(prepared)} tokens a step"
    )


def _periods(level: Level) -> str:
    return said_periods(own.period for own in level.periods)


def _outer(level: Level) -> str:
    """What to say of its outer steps, or of the copy that it holds."""
    if level.copy is not None:
        return f", a copy at rate {level.copy.rate:g}"
    if level.outer is None:
        return ""
    return f", outer step every {level.outer.every} updates{' of each node' * level.local}"


def _tokens_a_step(prepared: Prepared) -> str:
    """Of a run in stages those of each."""
    counts = [stage.tokens_per_step for stage in prepared.stages]
    return ", then ".join(map(str, counts))


def level_records(
    prepared: Prepared,
    optimizer: LevelOptimizer,
    step: int,
    updated: dict[int, dict[str, float | None]],
) -> dict[str, Any]:
    """The levels of the train record of a step (see `nlscale.telemetry.run`), by name."""
    until = partial(tokens_until, prepared.stages)
    records = {}
    for level in prepared.levels:
        updates, reductions = optimizer.counts(level.index)
        records[level.name] = {
            "period": level.period_at(step),
            "updates": updates,
            "reductions": reductions,
            "updated": level.index in updated,
            "window_fill": optimizer.window_fill(level.index, step, until),
            "learning_rate": None,
            "grad_norm": None,
            "update_ratio": None,
            **updated.get(level.index, {}),
            **optimizer.noise(level.index),
        }
    return records


def source_records(prepared: Prepared, trainer: Trainer, verdict: Verdict) -> dict[str, Any]:
    """`sources` of a train record (see `nlscale.telemetry.run`); nothing where there is one alone.

    Args:
        prepared: what the run is made of.
        trainer: after the step.
        verdict: of the step.
    """
    if (sources := prepared.sources) is None:
        return {}
    tokens, epochs = sources.read(samples_of_cuts(prepared.stages, trainer.counters.samples))
    losses, counted = verdict.source_losses, verdict.source_counted
    return {
        "sources": {
            sources.names[i]: {
                "loss": losses[i] if counted[i] else None,
                "tokens": tokens[i],
                "epochs": epochs[i],
            }
            for i in sources.shown
        }
    }


def standing_still(updated: dict[int, dict[str, float | None]]) -> set[int]:
    """Levels whose update is next to nothing beside their weights."""
    ratios = {level: seen["update_ratio"] for level, seen in updated.items()}
    return {level for level, ratio in ratios.items() if ratio is not None and ratio < _STANDS_STILL}


def hardly_moves(level: str, step: int, seen: dict[str, float | None]) -> str:
    """A warning on a level that stands still."""
    return (
        f"level {level!r} hardly moves: its update at step {step} is {seen['update_ratio']:.1e} of "
        f"its weights; raise its learning_rate"
    )


def stopped(config: Config, step: int, why: str | None) -> Stopped:
    """What ends a run that was asked to stop after that step; `why` if this rank knows."""
    after = f"stopped after step {step:,} of {config.train.steps:,}{f' ({why})' if why else ''}"
    if saves(config.checkpoint):
        error = Stopped(f"{after} with a checkpoint; the same command goes on from it")
    else:
        error = Stopped(f"{after}; nothing was saved, because checkpoint.every is null")
    error.echo = why is None
    return error


def summarise(
    trainer: Trainer, prepared: Prepared, held_out: dict[str, Any], costs: Costs
) -> dict[str, Any]:
    """What summary.json holds of a finished run, but for its goodput.

    Args:
        trainer: after the last step.
        prepared: what the run is made of.
        held_out: the last validation's record.
        costs: of the steps of this start.
    """
    config, counters, optimizer = trainer.config, trainer.counters, trainer.optimizer
    parameters, parts = level_parameters(config, prepared.vocabulary), parts_of(config)
    mean = statistics.fmean(counters.last_losses) if counters.last_losses else math.nan
    return {
        "initial_loss": counters.first_loss,
        "final_train_loss": mean,
        "final_val_loss": held_out["loss"],
        "val_bits_per_byte": held_out["bits_per_byte"],
        **({"val_of_end": held_out["of_end"]} if "of_end" in held_out else {}),
        "unigram_bits_per_byte": unigram_bits_per_byte(prepared.validation),
        "steps": config.train.steps,
        "dropped_steps": counters.dropped,
        "tokens": counters.tokens,
        **costs.summary(),
        "parameters": sum(parameters),
        "parameters_non_embedding": non_embedding_parameters(config, prepared.vocabulary),
        "flops": mean_flops_per_token(config, prepared.vocabulary) * counters.tokens,
        "levels": [
            {
                "name": level.name,
                "parts": [part.value for part in parts.of_level(level.index)],
                **periods_to_plain(level.periods),
                "parameters": parameters[level.index],
                "updates": optimizer.counts(level.index)[0],
                "reductions": optimizer.counts(level.index)[1],
                "wire": level.wire.value,
                "outer_steps": optimizer.outer_steps(level.index),
                "local": level.local,
                "copy_rate": None if level.copy is None else level.copy.rate,
                "approximate": bool(
                    why_approximate(level, prepared.levels, crosses=trainer.layout.nodes > 1)
                ),
            }
            for level in prepared.levels
        ],
    }
