"""The training loop, top to bottom.

    sample order -> batch -> micro batches through the model -> consensus -> windows
    -> due levels: reduce, clip, step -> telemetry

Nothing goes back up, and every rank takes the same decisions because it sees the same verdict.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nlscale.checkpoint.resume import check_store, resume
from nlscale.checkpoint.saver import Saver, saves, store_of
from nlscale.checkpoint.state import start_from_weights
from nlscale.cluster.life.attempts import Attempts, goodput, time_spent
from nlscale.cluster.life.deadline import Deadline
from nlscale.cluster.life.signals import StopSignals
from nlscale.cluster.life.watch import begin_step, doing
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import SaidElsewhere, TrainingFailed, UserError
from nlscale.evaluate.table import evaluation
from nlscale.levels.spectrum import slow_level_warnings
from nlscale.parallel.consensus import Requests
from nlscale.parallel.layout import Layout, process_groups
from nlscale.step import stragglers
from nlscale.step.trainer import Trainer
from nlscale.telemetry.figures import LOSS_FIGURE, SUMMARY_FILE
from nlscale.telemetry.run import Telemetry, WandbOptions
from nlscale.train.batches import StepReader
from nlscale.train.folder import CONFIG_FILE
from nlscale.train.prepare import Prepared
from nlscale.train.summary import (
    describe,
    hardly_moves,
    level_records,
    standing_still,
    stopped,
    summarise,
)


def train(config: Config, prepared: Prepared, signals: StopSignals) -> dict[str, Any]:
    """Train as configured; returns what summary.json holds.

    Args:
        config: the run.
        prepared: what `nlscale.train.prepare.prepare` made of it.
        signals: that tell this process to stop, entered.

    Raises:
        UserError: run.dir holds another run; raised before any process group exists.
        GaveUp: this Slurm job has started it too often without a new checkpoint; likewise.
        TrainingFailed: the run started and cannot go on.
        LostRank: a rank was lost, hangs, or never came.
        Stopped: it was asked to, by a signal to any rank, or its job is about to end.
        SaidElsewhere: another rank has said why.
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
    attempts = Attempts(run_dir)
    if saves(config.checkpoint):
        check_store(config, prepared.data, store_of(config.run))
        newest = store_of(config.run).checkpoints()[-1:]
        attempts.check(newest[0].step if newest else 0, config.run.max_restarts)
    try:
        with process_groups(config, attempts.end) as layout:
            if layout.is_writer:
                run_dir.mkdir(parents=True, exist_ok=True)
                recipe.write(config, run_dir / CONFIG_FILE)
            with _telemetry(config, prepared, layout) as telemetry:
                return _run(config, prepared, layout, telemetry, signals, attempts)
    except SaidElsewhere:
        raise
    except BaseException as error:
        attempts.end(str(error) if isinstance(error, UserError) else repr(error))
        raise


def _run(
    config: Config,
    prepared: Prepared,
    layout: Layout,
    telemetry: Telemetry,
    signals: StopSignals,
    attempts: Attempts,
) -> dict[str, Any]:
    trainer = Trainer.build(config, layout, prepared.levels, prepared.vocabulary)
    telemetry.note(describe(config, prepared, layout))
    layers, stagger = config.model.layers, config.levels.stagger
    for warning in slow_level_warnings(prepared.levels, layers, stagger, config.train.steps):
        telemetry.warn(warning)
    with _begin(trainer, prepared, telemetry, signals, attempts) as saver:
        counters, optimizer = trainer.counters, trainer.optimizer
        reader = StepReader(trainer, prepared)
        deadline = Deadline()
        warned: set[int] = set()
        slow_ranks: set[int] = set()
        speeds: list[float] = []
        held_out: dict[str, Any] = {}
        seconds = 0.0
        signals.training()
        if counters.step in (0, config.train.steps):
            held_out = _validate(prepared, trainer, telemetry)
        while counters.step < config.train.steps:
            started, stalled = time.monotonic(), saver.take_stalled()
            begin_step(counters.step + 1)
            trainer.busy.start()
            with doing("reading data"):
                batches = reader.take()
            ends = layout.is_writer and deadline.is_near(seconds, saver.seconds)
            requests = Requests(
                stop=signals.came or ends,
                save=saver.wants(counters, prepared.tokens_per_step),
                failed=saver.failed,
            )
            verdict, updated = trainer.take_step(batches, requests)
            step = counters.step
            if verdict.asked.failed:
                saver.give_up()
            _give_up_after(config, counters.dropped_in_a_row, step)
            for level in standing_still(updated) - warned:
                telemetry.warn(hardly_moves(prepared.levels[level].name, step, updated[level]))
                warned.add(level)
            _check_replicas(trainer)
            seconds = time.monotonic() - started
            speeds.append(verdict.tokens / seconds)
            telemetry.train_step(
                {
                    "kind": "train",
                    "step": step,
                    "time": time.time(),
                    "tokens": counters.tokens,
                    "loss": verdict.loss,
                    "tokens_per_second": speeds[-1],
                    "step_seconds": seconds,
                    "checkpoint_seconds": stalled,
                    "dropped_steps": counters.dropped,
                    "bytes_sent": counters.bytes_sent,
                    "bytes_saved": counters.bytes_saved,
                    "levels": level_records(prepared, optimizer, updated),
                    **_ranks(trainer, telemetry, slow_ranks),
                }
            )
            last = step == config.train.steps
            if step % config.train.validate_every == 0 or last:
                held_out = _validate(prepared, trainer, telemetry)
            if saves(config.checkpoint) and (verdict.asked.save or verdict.asked.stop or last):
                saver.save()
            if verdict.asked.stop and not last:
                saver.finish()
                raise stopped(config, step, signals.name or ("the job ends" if ends else None))
        saver.finish()

    summary = summarise(trainer, prepared, held_out, speeds)
    if layout.is_writer:
        summary["goodput"] = goodput(attempts.events, telemetry.records(), time.time())
    telemetry.finish(summary)
    return summary


def _begin(
    trainer: Trainer,
    prepared: Prepared,
    telemetry: Telemetry,
    signals: StopSignals,
    attempts: Attempts,
) -> Saver:
    """Go on from the run's newest checkpoint, or start from weights that were given or drawn."""
    store = store_of(trainer.config.run)
    with doing("reading a checkpoint", checkpoint=True):
        checkpoint = resume(trainer, prepared.data, store, telemetry.warn)
    if checkpoint is not None:
        telemetry.note(
            f"resuming from {checkpoint.path}, step {checkpoint.step:,} of "
            f"{trainer.config.train.steps:,}"
        )
    elif trainer.config.run.weights is not None:
        start_from_weights(trainer, Path(trainer.config.run.weights))
        telemetry.note(f"starting from the weights in {trainer.config.run.weights}")
    # Also of a run that ended before its first checkpoint, which is taken from the beginning.
    step = checkpoint.step if checkpoint is not None else -1
    before = telemetry.records()
    lost = telemetry.truncate_after(step)
    if trainer.layout.is_writer:
        redone = sum(time_spent(lost).values())
        seen = [record["time"] for record in before if "time" in record]
        attempts.begin(signals.since, max(step, 0), redone, seen[-1] if seen else None)
    return Saver(trainer, prepared.data, telemetry.wandb_id, store, telemetry.note)


def _ranks(trainer: Trainer, telemetry: Telemetry, warned: set[int]) -> dict[str, Any]:
    """Of a train record: how long the ranks computed, where that was compared after this step."""
    every, step = trainer.config.parallel.straggler_check_every, trainer.counters.step
    if not every or step % every or trainer.layout.world == 1:
        return {}
    spread = stragglers.compare(trainer.layout, trainer.busy.take())
    if spread.warning is not None and spread.slowest_rank not in warned:
        telemetry.warn(f"step {step}: {spread.warning}")
        warned.add(spread.slowest_rank)
    return {"ranks": asdict(spread)}


def _validate(prepared: Prepared, trainer: Trainer, telemetry: Telemetry) -> dict[str, Any]:
    """The validation's record; other evaluations that the configuration names follow it."""

    def ask(name: str, kind: str) -> dict[str, Any]:
        started = time.monotonic()
        with doing(kind):
            found = evaluation(name).run(trainer, prepared.validation)
        own = {
            "kind": kind,
            "step": trainer.counters.step,
            "time": time.time(),
            "seconds": time.monotonic() - started,
            "tokens": trainer.counters.tokens,
        }
        if taken := found.keys() & own.keys():
            raise TrainingFailed(
                f"the evaluation {name!r} calls a figure {min(taken)!r}, as every record calls "
                f"something else; give it another name"
            )
        return {**own, **found}

    record = ask("loss", "validation")
    telemetry.validation(record)
    for name in trainer.config.evaluate:
        telemetry.evaluation(name, ask(name, "evaluation"))
    return record


def finished_summary(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """The summary of the run in that folder, if it is this very run and has finished.

    Raises:
        UserError: another run has finished there.
    """
    summary, written = run_dir / SUMMARY_FILE, run_dir / CONFIG_FILE
    if not summary.exists():
        return None
    if not _is_of(config, written):
        raise UserError(
            f"{run_dir} holds another finished run; give run.dir=... or remove that folder"
        )
    return json.loads(summary.read_text())


def _is_of(config: Config, written: Path) -> bool:
    """Whether that file is what `recipe.write` makes of the configuration."""
    mine = recipe.to_plain(config)
    mine["run"]["imports"] = []
    try:
        return recipe.to_plain(recipe.load(written).config) == mine
    except UserError:  # none, or of a mixer that this process knows nothing of
        return False


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


def _check_replicas(trainer: Trainer) -> None:
    every, step = trainer.config.parallel.replica_check_every, trainer.counters.step
    if not every or step % every:
        return
    with doing("comparison of the replicas"):
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
        f"{config.model.mixer} diverged. Lower optimizer.learning_rate "
        f"({config.optimizer.learning_rate:g}) or use model.mixer=hope"
    )
