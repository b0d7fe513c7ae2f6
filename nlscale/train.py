"""The training loop, top to bottom.

    sample order -> batch -> micro batches through the model -> consensus -> windows
    -> due levels: reduce, clip, step -> telemetry

Nothing goes back up, and every rank takes the same decisions because it sees the same verdict.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nlscale import recipe
from nlscale.checkpoint.resume import check_store, resume
from nlscale.checkpoint.saver import Saver, saves, store_of
from nlscale.checkpoint.state import start_from_weights
from nlscale.checks import Prepared
from nlscale.config import Config
from nlscale.data import Samples
from nlscale.errors import Stopped, TrainingFailed, UserError
from nlscale.figures import LOSS_FIGURE, SUMMARY_FILE
from nlscale.levels import slow_level_warnings
from nlscale.model.sizes import level_parameters
from nlscale.optim.levels import LevelOptimizer
from nlscale.parallel.consensus import Requests, Verdict, agree
from nlscale.parallel.layout import Layout, process_groups
from nlscale.parallel.schedule import Batch, run_micro_batches
from nlscale.signals import StopSignals
from nlscale.telemetry import Telemetry, WandbOptions
from nlscale.trainer import Trainer

CONFIG_FILE = "config.yaml"
_STANDS_STILL = 1e-7


def train(config: Config, prepared: Prepared) -> dict[str, Any]:
    """Train as configured; returns what summary.json holds.

    Args:
        config: the run.
        prepared: what `nlscale.checks.prepare` made of it.

    Raises:
        UserError: run.dir holds another run; raised before any process group exists.
        TrainingFailed: the run started and cannot go on.
        Stopped: it was asked to, by a signal to any rank.
    """
    run_dir = Path(config.run.dir)
    finished = finished_summary(config, run_dir)
    if finished is not None:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{run_dir} has finished before, with validation loss "
                f"{finished['final_val_loss']:.3f}; remove it to train anew\n"
                f"figure: {run_dir / LOSS_FIGURE}"
            )
        return finished
    if saves(config):
        check_store(config, prepared.data, store_of(config))
    with process_groups(config) as layout:
        if layout.is_writer:
            run_dir.mkdir(parents=True, exist_ok=True)
            recipe.write(config, run_dir / CONFIG_FILE)
        with _telemetry(config, prepared, layout) as telemetry, StopSignals() as signals:
            return _run(config, prepared, layout, telemetry, signals)


def _run(
    config: Config,
    prepared: Prepared,
    layout: Layout,
    telemetry: Telemetry,
    signals: StopSignals,
) -> dict[str, Any]:
    trainer = Trainer.build(config, layout, prepared.levels, prepared.vocabulary)
    parameters = level_parameters(config, prepared.vocabulary)
    telemetry.note(_describe(config, prepared, layout, parameters))
    layers, stagger = config.model.layers, config.levels.stagger
    for warning in slow_level_warnings(prepared.levels, layers, stagger, config.train.steps):
        telemetry.warn(warning)
    with _begin(trainer, prepared, telemetry) as saver:
        counters, optimizer = trainer.counters, trainer.optimizer
        warned: set[int] = set()
        speeds: list[float] = []
        held_out: dict[str, Any] = {}
        if counters.step in (0, config.train.steps):
            held_out = _validate(prepared, trainer, telemetry)
        while counters.step < config.train.steps:
            started = time.monotonic()
            requests = Requests(
                stop=signals.came,
                save=saver.wants(counters, prepared.tokens_per_step),
                failed=saver.failed,
            )
            verdict, updated = trainer.take_step(read_step(trainer, prepared), requests)
            step = counters.step
            if verdict.asked.failed:
                saver.give_up()
            _give_up_after(config, counters.dropped_in_a_row, step)
            for level in _standing_still(updated) - warned:
                telemetry.warn(_hardly_moves(prepared.levels[level].name, step, updated[level]))
                warned.add(level)
            _check_replicas(trainer)
            seconds = time.monotonic() - started
            speeds.append(verdict.tokens / seconds)
            telemetry.train_step(
                {
                    "kind": "train",
                    "step": step,
                    "tokens": counters.tokens,
                    "loss": verdict.loss,
                    "tokens_per_second": speeds[-1],
                    "step_seconds": seconds,
                    "dropped_steps": counters.dropped,
                    "bytes_sent": counters.bytes_sent,
                    "bytes_saved": counters.bytes_saved,
                    "levels": _level_records(prepared, optimizer, updated),
                }
            )
            last = step == config.train.steps
            if step % config.train.validate_every == 0 or last:
                held_out = _validate(prepared, trainer, telemetry)
            if saves(config) and (verdict.asked.save or verdict.asked.stop or last):
                saver.save()
            if verdict.asked.stop and not last:
                saver.finish()
                raise Stopped(_stopped(config, step, signals))
        saver.finish()

    mean = statistics.fmean(counters.last_losses) if counters.last_losses else math.nan
    summary = {
        "initial_loss": counters.first_loss,
        "final_train_loss": mean,
        "final_val_loss": held_out["loss"],
        "val_bits_per_byte": held_out["bits_per_byte"],
        "unigram_bits_per_byte": prepared.validation.shards.index["unigram_bits_per_byte"],
        "steps": config.train.steps,
        "dropped_steps": counters.dropped,
        "tokens": counters.tokens,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "parameters": sum(parameters),
        "levels": [
            {
                "name": level.name,
                "period_steps": level.period,
                "parameters": parameters[level.index],
                "updates": optimizer.counts(level.index)[0],
                "reductions": optimizer.counts(level.index)[1],
            }
            for level in prepared.levels
        ],
    }
    telemetry.finish(summary)
    return summary


def _begin(trainer: Trainer, prepared: Prepared, telemetry: Telemetry) -> Saver:
    """Go on from the run's newest checkpoint, or start from weights that were given or drawn."""
    store = store_of(trainer.config)
    checkpoint = resume(trainer, prepared.data, store, telemetry.warn)
    if checkpoint is not None:
        telemetry.truncate_after(checkpoint.step)
        telemetry.note(
            f"resuming from {checkpoint.path}, step {checkpoint.step:,} of "
            f"{trainer.config.train.steps:,}"
        )
    else:
        telemetry.truncate_after(-1)  # of a run that ended before its first checkpoint
        if trainer.config.run.weights is not None:
            start_from_weights(trainer, Path(trainer.config.run.weights))
            telemetry.note(f"starting from the weights in {trainer.config.run.weights}")
    return Saver(trainer, prepared.data, telemetry.wandb_id, store, telemetry.note)


def read_step(trainer: Trainer, prepared: Prepared) -> list[Batch]:
    """This rank's micro batches of the next step.

    Sample numbers are global: which rank reads a sample changes with the layout, which samples a
    step reads does not.
    """
    layout, size = trainer.layout, trainer.config.train.micro_batch
    first = trainer.counters.samples
    batches = []
    for i in range(prepared.micro_batches):
        offset = (i * layout.data_size + layout.data_rank) * size
        batches.append(_to_batch(prepared.reader.read(first + offset, size), layout, size))
    return batches


def _validate(prepared: Prepared, trainer: Trainer, telemetry: Telemetry) -> dict[str, Any]:
    verdict = validation_loss(trainer, prepared.validation)
    bits_per_token = verdict.loss / math.log(2)
    record = {
        "kind": "validation",
        "step": trainer.counters.step,
        "tokens": trainer.counters.tokens,
        "loss": verdict.loss,
        "bits_per_byte": bits_per_token / prepared.validation.shards.bytes_per_token,
    }
    telemetry.validation(record)
    return record


def validation_loss(trainer: Trainer, samples: Samples) -> Verdict:
    """Loss over the first held-out sequences, shared out over the data-parallel ranks.

    Every rank passes as many micro batches of one size as the schedule wants; rows beyond its
    share are read again to fill them and are not counted.
    """
    config, layout = trainer.config, trainer.layout
    size, group = config.train.micro_batch, config.parallel.pipeline
    count = min(config.train.validation_sequences, len(samples))
    mine = range(layout.data_rank, count, layout.data_size)
    batches = []
    for i in range(-(-count // (size * layout.data_size * group)) * group):
        numbers = mine[i * size : (i + 1) * size]
        filled = [*numbers, *[0] * (size - len(numbers))]
        batches.append(_to_batch(np.stack([samples[n] for n in filled]), layout, len(numbers)))
    loss_sum, seen = run_micro_batches(trainer.stages, batches, None)
    return agree(layout, loss_sum, seen, torch.tensor(True, device=layout.device))


def finished_summary(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """The summary of the run in that folder, if it is this very run and has finished.

    Raises:
        UserError: another run has finished there.
    """
    summary, written = run_dir / SUMMARY_FILE, run_dir / CONFIG_FILE
    if not summary.exists():
        return None
    same = written.exists() and recipe.to_plain(recipe.load(written).config) == recipe.to_plain(
        config
    )
    if not same:
        raise UserError(
            f"{run_dir} holds another finished run; give run.dir=... or remove that folder"
        )
    return json.loads(summary.read_text())


def _telemetry(config: Config, prepared: Prepared, layout: Layout) -> Telemetry:
    if not layout.is_writer:
        return Telemetry.silent()
    options = WandbOptions(
        enabled=config.wandb.enabled, project=config.wandb.project, name=config.wandb.name
    )
    return Telemetry(
        Path(config.run.dir),
        config.train.steps,
        options,
        recipe.to_plain(config),
        prepared.tokens_per_step,
    )


def _level_records(
    prepared: Prepared, optimizer: LevelOptimizer, updated: dict[int, dict[str, float | None]]
) -> dict[str, Any]:
    records = {}
    for level in prepared.levels:
        updates, reductions = optimizer.counts(level.index)
        records[level.name] = {
            "period": level.period,
            "updates": updates,
            "reductions": reductions,
            "updated": level.index in updated,
            "window_fill": optimizer.window_fill(level.index, prepared.tokens_per_step),
            "learning_rate": None,
            "grad_norm": None,
            "update_ratio": None,
            **updated.get(level.index, {}),
        }
    return records


def _standing_still(updated: dict[int, dict[str, float | None]]) -> set[int]:
    """Levels whose update is next to nothing beside their weights."""
    ratios = {level: seen["update_ratio"] for level, seen in updated.items()}
    return {level for level, ratio in ratios.items() if ratio is not None and ratio < _STANDS_STILL}


def _stopped(config: Config, step: int, signals: StopSignals) -> str:
    after = f"stopped after step {step:,} of {config.train.steps:,}"
    why = f" ({signals.name})" if signals.came else ""
    if not saves(config):
        return f"{after}{why}; nothing was saved, because checkpoint.every is null"
    return f"{after}{why} with a checkpoint; the same command goes on from it"


def _hardly_moves(level: str, step: int, seen: dict[str, float | None]) -> str:
    return (
        f"level {level!r} hardly moves: its update at step {step} is {seen['update_ratio']:.1e} of "
        f"its weights; raise its learning_rate"
    )


def _check_replicas(trainer: Trainer) -> None:
    every, step = trainer.config.parallel.replica_check_every, trainer.counters.step
    if not every or step % every:
        return
    different = trainer.optimizer.replica_difference(trainer.named_parameters())
    if different is not None:
        raise TrainingFailed(
            f"replicas differ after step {step}, first in {different}: a rank computed "
            f"something else than the others; check its memory and GPU before going on"
        )


def _give_up_after(config: Config, dropped_in_a_row: int, step: int) -> None:
    if dropped_in_a_row < config.train.max_dropped_steps:
        return
    raise TrainingFailed(
        f"{dropped_in_a_row} steps in a row were dropped, the last of them step {step}: loss or "
        f"gradient not finite{' or spiking' if config.train.drop_spikes else ''}; "
        f"{config.model.mixer.value} diverged. Lower optimizer.learning_rate "
        f"({config.optimizer.learning_rate:g}) or use model.mixer=hope"
    )


def _describe(config: Config, prepared: Prepared, layout: Layout, parameters: list[int]) -> str:
    spectrum = ", ".join(
        f"{level.name} every {level.period} ({count / 1e6:.2f}M)"
        for level, count in zip(prepared.levels, parameters, strict=True)
    )
    return (
        f"{config.model.mixer.value}, {sum(parameters) / 1e6:.2f}M parameters; levels: {spectrum}; "
        f"{layout.world} rank{'s' * (layout.world > 1)} on {layout.device.type}, "
        f"{config.train.dtype.value}, {prepared.tokens_per_step} tokens a step"
    )


def _to_batch(samples: NDArray[np.int64], layout: Layout, counted: int) -> Batch:
    rows = torch.from_numpy(samples).to(layout.device)
    return Batch(rows[:, :-1], rows[:, 1:], counted)
