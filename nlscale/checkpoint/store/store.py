"""A folder of checkpoints of which one is always whole, whatever happens while one is written.

checkpoints/
    LATEST                  the name of the checkpoint written last
    step-00000037/
        __0_0.distcp ...    tensors, one file a rank (torch.distributed.checkpoint, DCP)
        .metadata           which box of which tensor is where (DCP)
        state.json          what is not a tensor
        manifest.json       bytes and sha256 of all of these; written last
    step-00000040.partial   being written
    step-00000037.replaced  set aside while a new one of that step takes its place
    step-00000030.deleted   being deleted
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from nlscale.checkpoint.store import dcp, files, manifest
from nlscale.checkpoint.store.checkpoint import STATE, Checkpoint, difference
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.safe import CheckpointError
from nlscale.checkpoint.store.together import Failure, Ranks
from nlscale.config.units import human_bytes

__all__ = ["Checkpoint", "CheckpointError", "Store", "Written", "refuse_unseen"]

LATEST = "LATEST"
_NAME = re.compile(r"step-(\d{8,})(\.partial|\.replaced|\.deleted)?")


@dataclass(frozen=True)
class Written:
    """What a save came to, the same on every rank."""

    path: Path
    bytes: int
    """Of all its files."""
    files: int
    seconds: float
    """Of the whole call, on the first rank."""


class Store:
    """The checkpoints of one run, of which one process or job writes at a time.

    Args:
        folder: made by the first save
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def checkpoints(self) -> list[Checkpoint]:
        """The finished ones, oldest first, whole or not; other names in the folder are ignored."""
        found: dict[int, Checkpoint] = {}
        for path, step, kind in self._entries():
            # Set aside and not replaced: the process ended between the two renames.
            if kind == "" or (kind == ".replaced" and step not in found):
                found[step] = Checkpoint(path, step)
        return [found[step] for step in sorted(found)]

    def newest_valid(
        self, say: Callable[[str], None], ranks: Ranks | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none at all, broken or not.

        Args:
            say: takes a line for each broken one that is passed over; on the first rank.
            ranks: that share the reading, all of which call this; None: this process alone.

        Raises:
            CheckpointError: there are checkpoints, and none is whole; lists why. Or a rank does not
                see, or cannot read, what the first one can.
        """
        ranks = ranks or Ranks()
        first = ranks.rank == 0
        found, latest = ranks.first(lambda: (self.checkpoints()[::-1], self._latest()))
        candidates: list[Checkpoint] = found
        newest = candidates[0].step if candidates else -1
        # LATEST is older than the newest where the process ended just before it wrote it
        if latest is not None and latest > newest and first:
            left = f"trying step {newest}" if candidates else "no other is left"
            say(f"checkpoint of step {latest}, the last one written, is gone; {left}")
        if candidates:
            ranks.each(lambda: refuse_unseen(candidates[0].path))
        broken = []
        for number, checkpoint in enumerate(candidates):
            problem = checkpoint.problem(ranks)
            if problem is None:
                return checkpoint
            broken.append(problem)
            older = candidates[number + 1 :]
            left = f"trying step {older[0].step}" if older else "no other is left"
            if first:
                say(f"checkpoint of step {checkpoint.step} is broken, {left}: {problem}")
        if broken:
            raise CheckpointError(
                f"none of the {len(broken)} checkpoints in {self.folder} is whole: "
                f"{'; '.join(broken)}"
            )
        return None

    def write(
        self,
        step: int,
        pieces: list[Piece],
        state: dict[str, Any],
        group: dist.ProcessGroup | None,
    ) -> Written:
        """Save the pieces of all ranks together; on return they are on the disk, and read back.

        Collective over the group; may be called from a background thread, if nothing else uses the
        group meanwhile. A checkpoint of that step that is there is replaced.

        Args:
            step: optimizer steps taken.
            pieces: of this rank, maybe none; together they must hold every element of each of
                their tensors once, and stay unchanged during the call.
            state: what JSON can hold; that of the first rank counts.
            group: a gloo group whose timeout exceeds the writing of the slowest rank's file;
                None: this process alone.

        Raises:
            CheckpointError: on every rank, if any of them failed; what was there stays as it was.
        """
        return _Save(self, step, pieces, state, group).run()

    def prune(
        self,
        keep: int,
        keep_every: int | None,
        whole: int | None = None,
        spare: int | None = None,
    ) -> list[int]:
        """Delete what is older than the newest `keep`, and what dead writers left behind.

        Called by one process, while none writes. The checkpoint written last is verified first.

        Args:
            keep: how many to keep, at least 1, counted from the one written last.
            keep_every: also keep every step that this divides.
            whole: the step of the checkpoint that `write` has just returned, which has been
                verified.
            spare: a step that stays this time, because it is being copied.

        Returns:
            The steps deleted, oldest first.

        Raises:
            CheckpointError: the newest is not whole, or the disk refuses; what is not deleted yet
                is kept.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep {keep} and keep_every {keep_every} must be at least 1")
        try:
            self._recover()
            checkpoints = self.checkpoints()
            if not checkpoints:
                return []
            steps = [checkpoint.step for checkpoint in checkpoints]
            latest = self._latest()
            # Newer than LATEST are those that a resume passed over as broken. They neither count
            # nor go: they are written again when the run gets there.
            last = steps.index(latest) if latest in steps else len(steps) - 1
            if steps[last] != whole:
                checkpoints[last].verify()
            removed = []
            for checkpoint in checkpoints[: max(0, last + 1 - keep)]:
                kept = keep_every is not None and checkpoint.step % keep_every == 0
                if not kept and checkpoint.step != spare:
                    self._delete(checkpoint.path)
                    removed.append(checkpoint.step)
            for path, step, kind in self._entries():
                if kind == ".deleted" or (kind == ".partial" and step <= steps[last]):
                    files.remove_folder(path)
            return removed
        except OSError as error:
            raise CheckpointError(
                f"older checkpoints were not deleted: {error.strerror} ({error.filename})"
            ) from error

    def _entries(self) -> list[tuple[Path, int, str]]:
        """Path, step and kind (`""`, `.partial` ...) of every folder of the store, by name."""
        entries = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                entries.append((path, int(match[1]), match[2] or ""))
        return entries

    def _latest(self) -> int | None:
        """The step that LATEST names; None where there is no such file, or another text in it."""
        try:
            text = (self.folder / LATEST).read_bytes().decode("ascii", "replace")
        except OSError:
            return None
        match = _NAME.fullmatch(text.strip())
        return int(match[1]) if match and not match[2] else None

    def _recover(self) -> None:
        """End what a writer that died had begun with `.replaced`."""
        for path, step, kind in self._entries():
            if kind == ".replaced":
                if path.with_name(_name(step)).exists():
                    self._delete(path)
                else:
                    files.rename(path, path.with_name(_name(step)))

    def _delete(self, path: Path) -> None:
        """Delete a finished checkpoint so that what is left of it never looks finished."""
        gone = path.with_suffix(".deleted")
        if gone.exists():
            files.remove_folder(gone)
        files.rename(path, gone)
        files.sync_folder(self.folder)
        files.remove_folder(gone)


class _Save:
    """One save, on one rank."""

    def __init__(
        self,
        store: Store,
        step: int,
        pieces: list[Piece],
        state: dict[str, Any],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._store = store
        self._step = step
        self._pieces = pieces
        self._state = state
        self._ranks = Ranks(group, self._describe, self._undo, beside=True)
        self._final = store.folder / _name(step)
        self._partial = self._final.with_suffix(".partial")
        self._started = time.monotonic()
        # set on the first rank by `_open`
        self._needed = 0  # bytes, about
        self._metadata = Metadata({})
        self._text = b""

    def run(self) -> Written:
        """See `Store.write`. The first rank alone touches anything but the data files."""
        plans = self._ranks.each(lambda: dcp.plan(self._pieces))
        self._ranks.first(lambda: self._open(plans))
        data = self._ranks.each(self._write_data)
        written = self._ranks.first(lambda: [one.digests for one in data])
        self._ranks.each(lambda: self._read_back(written))
        return self._ranks.first(lambda: self._finish(data))

    def _open(self, plans: list[dcp.SavePlan]) -> None:
        self._metadata = dcp.combine(plans)
        self._text = (json.dumps(self._state, indent=1) + "\n").encode()
        self._needed = dcp.about_bytes(plans) + len(self._text)
        if not self._store.folder.exists():
            files.make_folder(self._store.folder)
            files.sync_folder(self._store.folder.parent)
        self._store._recover()
        if self._partial.exists():
            files.remove_folder(self._partial)
        if shutil.disk_usage(self._store.folder).free < self._needed:
            # now, and not when the disk is full: the run's logs are on it as well
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._store.folder))
        files.make_folder(self._partial)

    def _write_data(self) -> dcp.DataFiles:
        if self._pieces and not self._partial.is_dir():
            raise CheckpointError(
                f"{self._partial}, which the first rank made, is not there: "
                f"it must be on a file system that all nodes share"
            )
        return dcp.write_data(self._partial, self._ranks.rank, self._pieces)

    def _read_back(self, written: list[dict[str, Digest]]) -> None:
        """Verify what the rank half of all ranks away wrote: on another node, if there is one.

        What a node reads of its own writing may come from its memory.
        """
        writer = (self._ranks.rank + self._ranks.size // 2) % self._ranks.size
        self._verify(written[writer])

    def _verify(self, written: dict[str, Digest]) -> None:
        problems = [difference(self._partial / name, digest) for name, digest in written.items()]
        if any(problems):
            raise CheckpointError(
                f"{self._partial.parent} does not hold what was written there: "
                f"{'; '.join(filter(None, problems))}"
            )

    def _finish(self, data: list[dcp.DataFiles]) -> Written:
        digests = dcp.write_metadata(self._partial, self._metadata, [one.results for one in data])
        digests[STATE] = files.write(self._partial / STATE, self._text)
        self._verify(digests)
        for one in data:
            digests |= one.digests
        text = manifest.render(self._step, digests)
        digests[manifest.NAME] = files.write(self._partial / manifest.NAME, text)
        files.sync_folder(self._partial)
        self._put_in_place()
        size = sum(digest.bytes for digest in digests.values())
        return Written(self._final, size, len(digests), time.monotonic() - self._started)

    def _put_in_place(self) -> None:
        """At every moment one whole checkpoint of this step, if there was one, has its name or is
        found as `.replaced`."""
        replaced = self._final.with_suffix(".replaced")
        if self._final.exists():
            files.rename(self._final, replaced)
        files.rename(self._partial, self._final)
        files.sync_folder(self._store.folder)
        files.replace(self._store.folder / LATEST, f"{self._final.name}\n".encode())
        if replaced.exists():
            self._store._delete(replaced)

    def _undo(self) -> None:
        # What cannot be undone either, on a disk that refuses everything, is left to the next save.
        with suppress(OSError):
            if self._partial.exists():
                files.remove_folder(self._partial)
        with suppress(OSError):
            self._store._recover()

    def _describe(self, failures: list[Failure]) -> str:
        one = failures[0]
        said = [f"checkpoint of step {self._step} was not written"]
        if one.who:
            said.append(one.who + (f" and {len(failures) - 1} more" if len(failures) > 1 else ""))
        said.append(one.reason)
        if one.disk_full:
            # what this save had written is removed by now, so this is what the next one will find
            with suppress(OSError):
                free = shutil.disk_usage(self._store.folder).free
                said.append(f"{human_bytes(free)} free, about {human_bytes(self._needed)} needed")
        return ": ".join(said)


def refuse_unseen(path: Path) -> None:
    """Refuse a checkpoint that the first rank sees and this one does not."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path.parent} on {socket.gethostname()} does not hold the checkpoint {path.name} "
            f"that the first rank sees: it must be a folder that all nodes share"
        )


def _name(step: int) -> str:
    return f"step-{step:08d}"
