"""May this configuration go on from that checkpoint, and from which one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlscale.checkpoint.mirror.fetch import fetch_newest
from nlscale.checkpoint.same_run import check_same_run
from nlscale.checkpoint.store.store import Checkpoint, CheckpointError, Store, refuse_unseen
from nlscale.checkpoint.store.together import Ranks
from nlscale.cluster.life.watch import doing
from nlscale.config.vocabulary import Config, ResumeConfig
from nlscale.errors import UserError
from nlscale.parallel.layout import Layout


def check_start(config: Config, data: dict[str, Any]) -> None:
    """Of a run without a checkpoint of its own: may it begin from that of `resume.start`.

    Raises:
        UserError: it is not there, or see `check_same_run`.
    """
    if config.checkpoint.mirror is not None:
        return  # which may have the run's own; what is wrong is said when neither has one
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


def find_checkpoint(
    config: Config,
    data: dict[str, Any],
    layout: Layout,
    store: Store,
    say: Callable[[str], None],
    note: Callable[[str], None] = lambda line: None,
) -> Checkpoint | None:
    """The run's newest checkpoint that is whole; None where there is none at all.

    Where the run has none, that is the checkpoint of another run that `resume.start` names. The
    same call on every rank; they share the reading.

    Args:
        config: of the run.
        data: what identifies its data.
        layout: this rank's place.
        store: the run's.
        say: takes a line on each broken checkpoint that is passed over.
        note: takes lines on what is fetched from checkpoint.mirror.

    Raises:
        UserError: the run may not go on from it, or not every node sees it.
        CheckpointError: none of the checkpoints is whole.
    """
    ranks = Ranks(layout.host)
    checkpoint = store.newest_valid(say, ranks)
    if checkpoint is None and config.checkpoint.mirror is not None:
        with doing("fetching a checkpoint from checkpoint.mirror", checkpoint=True):
            checkpoint = fetch_newest(config.checkpoint.mirror, store, layout.host, note)
    if checkpoint is None:
        checkpoint = ranks.first(lambda: _start(config.resume))
        if checkpoint is not None:
            found = checkpoint
            ranks.each(lambda: refuse_unseen(found.path))
            checkpoint.verify(ranks)
    if checkpoint is not None:
        check_same_run(config, data, checkpoint.state, str(checkpoint.path))
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
