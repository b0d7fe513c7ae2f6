"""May this configuration go on from that checkpoint, and from which one."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nlscale.checkpoint.same_run import check_same_run
from nlscale.checkpoint.state import restore
from nlscale.checkpoint.store.store import Checkpoint, CheckpointError, Store
from nlscale.config.vocabulary import Config, ResumeConfig
from nlscale.errors import UserError
from nlscale.step.trainer import Trainer


def check_start(config: Config, data: dict[str, Any]) -> None:
    """Of a run without a checkpoint of its own: may it begin from that of `resume.start`.

    Raises:
        UserError: it is not there, or see `check_same_run`.
    """
    checkpoint = _start(config.resume)
    if checkpoint is None:
        return
    try:
        state = checkpoint.state
    except CheckpointError:
        return  # a broken one is refused, with what is wrong, when it is loaded
    check_same_run(config, data, state, str(checkpoint.path))


def check_writable(store: Store) -> None:
    """Make the folder of checkpoints and see that this rank can write there.

    Raises:
        UserError: it cannot.
    """
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.folder) as file:
            file.write(b"nlscale")
            file.flush()
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints in {store.folder}: {error.strerror}; mend that, give "
            f"another run.dir or checkpoint.every=null"
        ) from None


def resume(
    trainer: Trainer, data: dict[str, Any], store: Store, say: Callable[[str], None]
) -> Checkpoint | None:
    """Put the trainer where the newest valid checkpoint was; None where there is none.

    Where the run has none at all, that is the checkpoint of another run that `resume.start` names.
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
            found = store.newest_valid(say) or _verified(_start(trainer.config.resume))
            choice[0] = None if found is None else (found.path.parent, found.step)
        except UserError as error:
            choice[1] = str(error)
    dist.broadcast_object_list(choice, src=0, group=trainer.layout.host)
    chosen, broken = choice
    if broken is not None:
        raise CheckpointError(broken)
    if chosen is None:
        return None
    folder, step = chosen
    checkpoint = next((c for c in Store(folder).checkpoints() if c.step == step), None)
    if checkpoint is None:
        raise UserError(
            f"{folder} on {socket.gethostname()} does not hold the checkpoint of step {step} "
            f"that the first rank sees: it must be a folder that all nodes share"
        )
    check_same_run(trainer.config, data, checkpoint.state, str(checkpoint.path))
    restore(trainer, checkpoint)
    return checkpoint


def _start(resume: ResumeConfig) -> Checkpoint | None:
    """The checkpoint of another run that `resume.start` names; None where it is null.

    Raises:
        UserError: there is none of that name.
    """
    if resume.start is None:
        return None
    path = Path(resume.start)
    for checkpoint in Store(path.parent).checkpoints():
        if checkpoint.path.stem == path.name:  # without the ending of one that is being replaced
            return checkpoint
    raise UserError(
        f"resume.start: there is no checkpoint {path}; `nlscale checkpoint list RUN` lists those "
        f"of a run, and resume.start=null trains from the beginning"
    )


def _verified(checkpoint: Checkpoint | None) -> Checkpoint | None:
    if checkpoint is not None:
        checkpoint.verify()
    return checkpoint
