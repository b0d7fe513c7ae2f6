"""Copies finished checkpoints to a mirror beside the training, which never waits for it.

One thread takes the newest checkpoint that was offered; a few more carry its files. What goes
wrong is a warning, and the next checkpoint is another attempt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nlscale.checkpoint.mirror.copy import GivenUp, Progress, copy, prune
from nlscale.checkpoint.mirror.label import Label, TakenOver
from nlscale.checkpoint.store.store import Checkpoint
from nlscale.cluster.life.owner import LostOwnership
from nlscale.config.units import human_bytes
from nlscale.config.vocabulary import CheckpointConfig
from nlscale.errors import UserError

PROGRESS_SECONDS = 10.0
"""Between two lines while the end of a run waits."""
STALLED_SECONDS = 300.0
"""Without a byte, after which the end of a run waits no longer."""
_LOOK_SECONDS = 0.2


class Copier:
    """Copies what it is offered, on the first rank.

    A context manager: leaving it, on errors too, gives up what is not finished, unless `close` has
    waited for it.

    Args:
        label: of the mirror, which is this run's; None: nothing is copied, and all methods do
            nothing.
        config: how many are kept.
        say: takes a line on each finished copy; called from the thread.
        warn: takes a line on what went wrong; likewise.
        check: called before anything is written; raises LostOwnership where this process may not,
            any more.
    """

    def __init__(
        self,
        label: Label | None,
        config: CheckpointConfig,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._label, self._config = label, config
        self._say, self._warn, self._check = say, warn, check
        self._changed = threading.Condition()
        self._over = label is None
        self._waiting: Checkpoint | None = None
        self._current: Checkpoint | None = None
        self._failed: Checkpoint | None = None
        """The newest that was offered, where its copy has failed."""
        self._progress = Progress(0)
        if label is not None:
            work = threading.Thread(target=self._run, args=(label,), name="mirror", daemon=True)
            work.start()

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(wait=False)

    @property
    def copying(self) -> int | None:
        """The step of the checkpoint that is being copied: it should stay in its folder."""
        current = self._current
        return current.step if current is not None else None

    def offer(self, checkpoint: Checkpoint) -> None:
        """Have it copied when the copy under way has ended, unless a newer one is offered first."""
        with self._changed:
            if self._over:
                return
            dropped, self._waiting, self._failed = self._waiting, checkpoint, None
            self._changed.notify_all()
        if dropped is not None:
            self._say(
                f"checkpoint of step {dropped.step} is not copied to the mirror, which is slower "
                f"than they come; step {checkpoint.step} is next"
            )

    def close(self, wait: bool, stop: Callable[[], bool] = lambda: False) -> bool:
        """Copy nothing that is offered from now on.

        Args:
            wait: until what was offered is copied, with lines on how far that is; a copy that has
                failed is attempted once more. Else what is not finished is given up at once: the
                next start offers it again.
            stop: asked while waiting; whether to give up.

        Returns:
            Whether the mirror has what was offered last.
        """
        if wait:
            with self._changed:
                if self._waiting is None and self._current is None and not self._over:
                    self._waiting, self._failed = self._failed, None
                    self._changed.notify_all()
            self._wait(stop)
        with self._changed:
            left = self._waiting or self._current or self._failed
            given_up, self._over = left is not self._failed and not self._over, True
            self._progress.given_up = True
            self._changed.notify_all()
        if given_up and left is not None:
            self._say(f"checkpoint of step {left.step} is not in the mirror: the run did not wait")
        return left is None

    def _wait(self, stop: Callable[[], bool]) -> None:
        said = moved = time.monotonic()
        seen = (-1, 0)
        while not stop():
            with self._changed:
                if self._over or (self._current is None and self._waiting is None):
                    return
                self._changed.wait(_LOOK_SECONDS)
                progress, now = self._progress, time.monotonic()
            if (progress.step, progress.copied) != seen:
                seen, moved = (progress.step, progress.copied), now
            if now - moved > STALLED_SECONDS:
                self._warn(f"the mirror has not taken a byte for {STALLED_SECONDS:.0f} s")
                return
            if now - said > PROGRESS_SECONDS:
                said = now
                self._say(_how_far(progress, now))

    def _run(self, label: Label) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._over:
                    self._changed.wait()
                if self._over or self._waiting is None:
                    return
                checkpoint, self._waiting = self._waiting, None
                self._current, self._progress = checkpoint, Progress(checkpoint.step)
            well = self._attempt(checkpoint, label)
            with self._changed:
                self._current = None
                self._failed = checkpoint if not well and self._waiting is None else None
                self._changed.notify_all()

    def _attempt(self, checkpoint: Checkpoint, label: Label) -> bool:
        try:
            self._copy(checkpoint, label)
            return True
        except (GivenUp, LostOwnership):
            return False  # said by who gave up, and by the training
        except TakenOver as error:
            with self._changed:
                self._over = True
            self._warn(str(error))
        except Exception as error:  # no copy is a reason to end a run
            why = str(error) if isinstance(error, UserError) else repr(error)
            self._warn(f"checkpoint of step {checkpoint.step} is not in the mirror: {why}")
        return False

    def _copy(self, checkpoint: Checkpoint, label: Label) -> None:
        def check() -> None:
            self._check()
            label.check()

        check()
        progress, remote = self._progress, label.remote
        if copy(checkpoint, remote, progress, check):
            seconds = time.monotonic() - progress.began
            self._say(
                f"checkpoint of step {checkpoint.step} copied to {remote.url}: "
                f"{human_bytes(progress.size)} in {seconds:.1f} s"
            )
        try:
            check()
            prune(remote, checkpoint.step, self._config.keep, self._config.keep_every)
        except (TakenOver, LostOwnership):
            raise
        except UserError as error:  # the copy is there all the same
            self._warn(f"older checkpoints were not removed from the mirror: {error}")


def _how_far(progress: Progress, now: float) -> str:
    line = f"copying the checkpoint of step {progress.step} to the mirror"
    copied, size = progress.copied, progress.size
    if not copied or not size:
        return line
    left = (now - progress.began) * (size - copied) / copied
    return f"{line}: {human_bytes(copied)} of {human_bytes(size)}, about {left:.0f} s left"
