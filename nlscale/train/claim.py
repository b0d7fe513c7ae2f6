"""A run's folder becomes this run's: the first rank takes it, for all, before any of them writes.

What lies there is looked at once more when it is taken, as another run may have ended there
meanwhile. What the first rank finds, every rank is told: they begin together, or end with one
reason.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from nlscale.checkpoint.mirror.label import Label
from nlscale.checkpoint.mirror.label import take as take_mirror
from nlscale.checkpoint.resume import check_writable
from nlscale.checkpoint.saver import saves, store_of
from nlscale.cluster.life import owner
from nlscale.cluster.life.watch import doing
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import Stopped, UserError
from nlscale.parallel.layout import Layout
from nlscale.train.folder import CONFIG_FILE, WRITER
from nlscale.train.found import Found, look, make_room


class Claim:
    """The folder of a run, held from `take` until the block of this context manager is left.

    Args:
        config: of the run.
        data: what identifies its data.
    """

    def __init__(self, config: Config, data: dict[str, Any]) -> None:
        self._config, self._data = config, data
        self._run_dir, self._store = Path(config.run.dir), store_of(config.run)
        self._ends = ExitStack()
        self._owned: owner.Owned | None = None
        self._number = 0
        self.label: Label | None = None
        """Of the mirror, on the first rank, where there is one."""
        self.found = Found()
        """What lay there when it was taken."""

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.close()

    def take(self, layout: Layout) -> None:
        """Take the folder, look at it, and make it ready. The same call on every rank.

        Raises:
            Held: another process has it; on every rank.
            UserError: it cannot be written, or see `nlscale.train.found.look`; on every rank.
        """
        told: list[Any] = [None]
        with doing("taking run.dir"):
            if layout.is_writer:
                try:
                    self._take()
                    told = [(self._number, self.found)]
                except Stopped:
                    raise  # of this rank's signal; the others are told how it ends
                except UserError as error:
                    told = [error]
            dist.broadcast_object_list(told, src=0, group=layout.host)
        if isinstance(told[0], UserError):
            raise told[0]
        self._number, self.found = told[0]
        # the first rank has seen to it in `_take`
        if not layout.is_writer and self.found.summary is None and saves(self._config.checkpoint):
            check_writable(self._store)

    def is_ours(self) -> bool:
        """Whether the folder was taken, and nobody has taken it since."""
        return self._number > 0 and owner.newest(self._run_dir) == self._number

    def check(self) -> None:
        """To be called before anything is written there.

        Raises:
            LostOwnership: on the first rank, the folder is another's by now.
        """
        if self._owned is not None:
            self._owned.check()

    def _take(self) -> None:
        self._owned = self._ends.enter_context(owner.hold(self._run_dir, WRITER))
        self._number = self._owned.number
        self.found = look(self._config, self._data, self._run_dir, self._store)
        self.label = take_mirror(self._config, self._data, self._run_dir, self._store)
        if self.found.summary is not None:
            return
        if saves(self._config.checkpoint):
            check_writable(self._store)
        make_room(self.found, self._run_dir)
        recipe.write(self._config, self._run_dir / CONFIG_FILE)
