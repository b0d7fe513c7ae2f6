"""May this configuration go on from that checkpoint, and from which one."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from nlscale import recipe
from nlscale.checkpoint.state import restore
from nlscale.checkpoint.store import Checkpoint, CheckpointError, Store
from nlscale.config import Config
from nlscale.errors import UserError
from nlscale.trainer import Trainer

_FREE = (
    "run.dir",
    "run.weights",
    "data.dir",
    "parallel.",
    "checkpoint.",
    "resume.",
    "wandb.",
    "train.micro_batch",
    "train.recompute",
    "train.validate_every",
    "train.validation_sequences",
    "train.max_dropped_steps",
)
"""What may differ without asking: where and how fast a run goes, not where to. The data are
compared by what they are."""


def check_same_run(config: Config, data: dict[str, Any], state: dict[str, Any], where: str) -> None:
    """Refuse to go on as another run than the one that was saved.

    Args:
        config: of the run that wants to go on.
        data: what identifies its data.
        state: of the checkpoint.
        where: what to call the checkpoint.

    Raises:
        UserError: one line for each key that differs and is not in `resume.allow`.
    """
    changed = differences(recipe.to_plain(config), state["config"])
    if data != state["data"]:
        changed["data"] = (state["data"], data)
    unknown = set(config.resume.allow) - set(changed) - {"data", *recipe.all_keys()}
    if unknown:
        raise UserError(f"resume.allow: unknown key {sorted(unknown)[0]!r}")
    refused = {key: values for key, values in changed.items() if key not in config.resume.allow}
    if refused:
        lines = [f"  {key}: {before!r} -> {now!r}" for key, (before, now) in refused.items()]
        raise UserError(
            f"{where} is of a run with other settings:\n" + "\n".join(lines) + "\n"
            f"give another run.dir, or go on with the change: "
            f"'resume.allow=[{','.join(refused)}]'"
        )


def check_store(config: Config, data: dict[str, Any], store: Store) -> None:
    """Before anything expensive: can the store be written, and may this run go on from it?

    Raises:
        UserError: it cannot be written; or see `check_same_run`.
    """
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints in {store.folder}: {error.strerror}; mend that, give "
            f"another run.dir or checkpoint.every=null"
        ) from None
    for checkpoint in store.checkpoints()[-1:]:
        try:
            state = checkpoint.state
        except CheckpointError:
            return  # a broken one is passed over when one is chosen
        check_same_run(config, data, state, str(checkpoint.path))


def resume(
    trainer: Trainer, data: dict[str, Any], store: Store, say: Callable[[str], None]
) -> Checkpoint | None:
    """Put the trainer where the newest valid checkpoint was; None where there is none.

    The first rank verifies and chooses, for all.

    Args:
        trainer: freshly built, the same on every rank.
        data: what identifies its data.
        store: the run's.
        say: takes a line on each broken checkpoint that is passed over.

    Raises:
        UserError: the run may not go on from it.
        CheckpointError: none of the checkpoints is whole.
    """
    choice: list[Any] = [None, None]
    if trainer.layout.is_writer:
        try:
            found = store.newest_valid(say)
            choice[0] = None if found is None else found.step
        except CheckpointError as error:
            choice[1] = str(error)
    dist.broadcast_object_list(choice, src=0, group=trainer.layout.host)
    step, broken = choice
    if broken is not None:
        raise CheckpointError(broken)
    if step is None:
        return None
    checkpoint = next((c for c in store.checkpoints() if c.step == step), None)
    if checkpoint is None:
        raise UserError(
            f"{store.folder} on {socket.gethostname()} does not hold the checkpoint of step {step} "
            f"that the first rank sees: run.dir must be a folder that all nodes share"
        )
    check_same_run(trainer.config, data, checkpoint.state, str(checkpoint.path))
    restore(trainer, checkpoint)
    return checkpoint


def differences(now: Any, before: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys that make another run and differ: (before, now) by dotted key."""
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        now, before = dict(enumerate(now)), dict(enumerate(before))
    if isinstance(now, dict) and isinstance(before, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in [*before, *(key for key in now if key not in before)]:
            key = f"{prefix}{name}"
            if not key.startswith(_FREE) and not f"{key}.".startswith(_FREE):
                found |= differences(now.get(name), before.get(name), f"{key}.")
        return found
    return {} if now == before else {prefix.rstrip("."): (before, now)}
