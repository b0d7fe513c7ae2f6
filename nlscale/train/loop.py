"""The training loop, top to bottom.

    sample order -> batch -> micro batches through the model, levels due: cross between nodes
    -> consensus -> windows, levels due: clip, step -> telemetry

Nothing goes back up, and every rank takes the same decisions because it sees the same verdict.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nlscale.checkpoint.mirror.check import probe_mirror
from nlscale.checkpoint.mirror.copier import Copier
from nlscale.checkpoint.restore import restore, start_from_weights
from nlscale.checkpoint.resume import find_checkpoint
from nlscale.checkpoint.saver import Saver, saves, store_of
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.checkpoint.store.together import Ranks
from nlscale.cluster.life.attempts import Attempts, goodput, time_spent
from nlscale.cluster.life.deadline import Deadline
from nlscale.cluster.life.place import place
from nlscale.cluster.life.signals import StopSignals
from nlscale.cluster.life.watch import begin_step, doing
from nlscale.config import recipe
from nlscale.config.curriculum import stage_of, tokens_per_step, tokens_until
from nlscale.config.vocabulary import Config
from nlscale.data.history import without_names
from nlscale.errors import SaidElsewhere, TrainingFailed, UserError
from nlscale.levels.notes import approximate, period_notes, slow_level_warnings
from nlscale.parallel.consensus import Requests
from nlscale.parallel.devices import queue_warnings
from nlscale.parallel.layout import Layout, process_groups
from nlscale.step import stragglers
from nlscale.step.trainer import Trainer
from nlscale.telemetry.figures import LOSS_FIGURE
from nlscale.telemetry.run import Telemetry, WandbOptions
from nlscale.telemetry.terminal import loss_text
from nlscale.train.batches import StepReader
from nlscale.train.claim import Claim
from nlscale.train.costs import Costs
from nlscale.train.dropped import Drops
from nlscale.train.found import look
from nlscale.train.hooks.calls import Hooks
from nlscale.train.hooks.hook import Running
from nlscale.train.mix_plan import lines as mixture_lines
from nlscale.train.prepare import Prepared, go_on
from nlscale.train.replay import BUFFER, Replay
from nlscale.train.summary import (
    describe,
    hardly_moves,
    level_records,
    source_records,
    standing_still,
    stopped,
    summarise,
)
from nlscale.train.validation import Validation
from nlscale.train.verify_data import verify_data


def train(config: Config, prepared: Prepared, signals: StopSignals) -> dict[str, Any]:
    """Train as configured; returns what summary.json holds.

    Args:
        config: the run.
        prepared: what `nlscale.train.prepare.prepare` made of it.
        signals: that tell this process to stop, entered.

    Raises:
        UserError: run.dir is held by another process, or holds another run; nothing was written.
        GaveUp: this Slurm job has started it too often without a new checkpoint; likewise.
        TrainingFailed: the run started and cannot go on.
        LostRank: a rank was lost, hangs, or never came.
        Stopped: it was asked to, by a signal to any rank, or its job is about to end.
        SaidElsewhere: another rank has said why.
    """
    run_dir, store = Path(config.run.dir), store_of(config.run)
    found = look(config, prepared.data, run_dir, store)
    if found.summary is not None and config.checkpoint.mirror is None:
        return _finished_before(run_dir, found.summary)
    with Claim(config, prepared.data) as claim:
        attempts = Attempts(run_dir, claim.is_ours)
        if saves(config.checkpoint):
            newest = store.checkpoints()[-1:]
            attempts.check(newest[0].step if newest else 0, config.run.max_restarts)
        try:
            told = {"the data": without_names(prepared.data)}
            with process_groups(config, attempts.end, told) as layout:
                Ranks(layout.host).first(lambda: probe_mirror(config))
                verify_data(config, prepared, layout)
                claim.take(layout)
                if claim.found.summary is not None:  # meanwhile, or not yet mirrored
                    _mirror_the_last(config, claim)
                    return _finished_before(run_dir, claim.found.summary)
                attempts.read()
                with _telemetry(config, prepared, layout) as telemetry:
                    return _run(config, prepared, layout, telemetry, signals, attempts, claim)
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
    claim: Claim,
) -> dict[str, Any]:
    for line in [*prepared.notes, *claim.found.notes]:
        telemetry.note(line)
    for line in [*claim.found.warnings, *attempts.warnings()]:
        telemetry.warn(line)
    with doing("verifying a checkpoint", checkpoint=True):
        store, warn, note = store_of(config.run), telemetry.warn, telemetry.note
        checkpoint = find_checkpoint(config, prepared.data, layout, store, warn, note)
    draws = checkpoint is None and config.run.weights is None
    prepared = go_on(config, prepared, checkpoint.state if checkpoint is not None else None)
    trainer = Trainer.build(config, layout, prepared.levels, prepared.vocabulary, draws)
    telemetry.note(describe(config, prepared, layout))
    mixed = mixture_lines(prepared.sources, prepared.folders, config)
    for line in [*period_notes(prepared.levels), *mixed]:
        telemetry.note(line)
    for warning in [
        *slow_level_warnings(config, prepared.levels),
        *approximate(prepared.levels, crosses=layout.nodes > 1),
        *queue_warnings(config.parallel, layout),
    ]:
        telemetry.warn(warning)
    _begin(trainer, checkpoint, telemetry, signals, attempts, claim)
    wandb_id = telemetry.wandb_id
    with (
        Copier(claim.label, config.checkpoint, note, warn, claim.check) as copier,
        Saver(trainer, prepared.data, wandb_id, store, note, claim.check, copier) as saver,
    ):
        if checkpoint is not None and checkpoint.path.parent == store.folder:
            copier.offer(checkpoint)
        counters, optimizer = trainer.counters, trainer.optimizer
        replay = Replay(trainer.noted.setdefault(BUFFER, {}), config.run.seed)
        reader = StepReader(trainer, prepared, replay)
        deadline, drops = Deadline(), Drops(config)
        warned: set[int] = set()
        slow_ranks: set[int] = set()
        costs = Costs(config, prepared, layout)
        validation = Validation(prepared, trainer, telemetry, claim)
        planned = partial(tokens_until, prepared.stages)
        hooks = Hooks(Running(trainer, prepared, telemetry, claim, replay))
        pace = 0.0  # seconds a token of the last step
        signals.training()
        if counters.step in (0, config.train.steps):
            validation.run()
        hooks.begin()
        while counters.step < config.train.steps:
            started, stalled = time.monotonic(), saver.take_stalled()
            stage = stage_of(prepared.stages, counters.step + 1)
            begin_step(counters.step + 1)
            trainer.busy.start()
            with doing("reading data"), trainer.clock.reading():
                batches = reader.take()
            ahead = planned(counters.step + 2) - planned(counters.step)
            between = pace * ahead + validation.reserve(counters.step)
            ends = layout.is_writer and deadline.is_near(between, saver.seconds)
            requests = Requests(
                stop=signals.came or ends,
                save=saver.wants(counters, stage.tokens_per_step),
                failed=saver.failed,
            )
            verdict, updated = trainer.take_step(batches, requests)
            step = counters.step
            if verdict.asked.failed:
                saver.give_up()
            drops.see(verdict, step, counters.dropped_in_a_row)
            for level in standing_still(updated) - warned - optimizer.added.frozen:
                telemetry.warn(hardly_moves(prepared.levels[level].name, step, updated[level]))
                warned.add(level)
            _check_replicas(trainer)
            seconds = time.monotonic() - started
            pace = seconds / stage.tokens_per_step
            cost = costs.of_step(stage, verdict.tokens, seconds, trainer.waits)
            claim.check()
            telemetry.train_step(
                {
                    "kind": "train",
                    "step": step,
                    "time": time.time(),
                    "tokens": counters.tokens,
                    "counted_tokens": counters.counted_tokens,
                    "loss": verdict.loss if verdict.counted_tokens else None,
                    **cost,
                    "checkpoint_seconds": stalled,
                    "dropped_steps": counters.dropped,
                    "dropped_because": verdict.dropped_because,
                    "bytes_sent": counters.bytes_sent,
                    "bytes_saved": counters.bytes_saved,
                    "levels": level_records(prepared, optimizer, step, updated),
                    **source_records(prepared, trainer, verdict),
                    **_ranks(trainer, telemetry, slow_ranks),
                }
            )
            hooks.after_step(updated)
            last = step == config.train.steps
            if validation.due(step):
                validation.run()
                trainer.clock.free()
            if saves(config.checkpoint) and (verdict.asked.save or verdict.asked.stop or last):
                saver.save()
                trainer.clock.free()
            if verdict.asked.stop and not last:
                saver.finish()
                raise stopped(config, step, signals.name or ("the job ends" if ends else None))
        saver.finish()
        summary = summarise(trainer, prepared, validation.held_out, costs)
        # the first rank's alone, for which no other waits any more
        copier.close(wait=True, stop=lambda: signals.came or deadline.is_near(0.0, 0.0))

    if layout.is_writer:
        claim.check()
        summary["goodput"] = goodput(attempts.events, telemetry.records(), time.time())
    telemetry.finish(summary)
    return summary


def _begin(
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    telemetry: Telemetry,
    signals: StopSignals,
    attempts: Attempts,
    claim: Claim,
) -> None:
    """Go on from a checkpoint, or start from weights that were given or drawn."""
    if checkpoint is not None:
        with doing("reading a checkpoint", checkpoint=True):
            restore(trainer, checkpoint)
        telemetry.note(
            f"resuming from {checkpoint.path}, step {checkpoint.step:,} of "
            f"{trainer.config.train.steps:,}"
        )
    elif trainer.config.run.weights is not None:
        start_from_weights(trainer, Path(trainer.config.run.weights))
        telemetry.note(f"starting from the weights in {trainer.config.run.weights}")
    # Also of a run that ended before its first checkpoint, which is taken from the beginning.
    step = checkpoint.step if checkpoint is not None else -1
    claim.check()
    before = telemetry.records()
    lost = telemetry.truncate_after(step)
    if trainer.layout.is_writer:
        redone = sum(time_spent(lost).values())
        times = [record.get("time") for record in before]
        seen = [moment for moment in times if isinstance(moment, int | float)]
        attempts.begin(signals.since, max(step, 0), redone, seen[-1] if seen else None)


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


def _finished_before(run_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Say so, once."""
    if place().rank == 0:
        print(
            f"{run_dir} has finished before, with validation loss "
            f"{loss_text(summary.get('final_val_loss'))}; more train.steps make it longer, another "
            f"run.dir trains anew\nfigure: {run_dir / LOSS_FIGURE}"
        )
    return summary


def _mirror_the_last(config: Config, claim: Claim) -> None:
    """Copy the last checkpoint of a run that has finished, where that could not be done then."""
    newest = store_of(config.run).checkpoints()[-1:]
    with Copier(claim.label, config.checkpoint, print, print, claim.check) as copier:
        for checkpoint in newest:
            copier.offer(checkpoint)
        copier.close(wait=True)


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
        tokens_per_step(config),
        partial(tokens_until, prepared.stages),
    )


def _check_replicas(trainer: Trainer) -> None:
    every, step = trainer.config.parallel.replica_check_every, trainer.counters.step
    if not every or step % every:
        return
    with doing("comparison of the replicas"):
        different = trainer.optimizer.replica_difference(trainer.named_parameters())
    trainer.clock.free()
    if different is not None:
        raise TrainingFailed(
            f"replicas differ after step {step}, first in {different}: a rank computed "
            f"something else than the others; check its memory and GPU before going on"
        )
