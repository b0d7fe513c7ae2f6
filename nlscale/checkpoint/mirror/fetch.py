"""Brings a checkpoint back from a mirror where the run's folder holds none.

The ranks fetch its files together, into a folder that gets its name when all of them are whole.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from nlscale.checkpoint.mirror.label import finished
from nlscale.checkpoint.mirror.remote import LATEST, MANIFEST, Missing, Remote, folder_of, step_of
from nlscale.checkpoint.mirror.transfers import for_each
from nlscale.checkpoint.store import files, manifest
from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.safe import CheckpointError
from nlscale.checkpoint.store.store import LATEST as NEWEST
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.checkpoint.store.together import Failure, Ranks
from nlscale.cluster.spread import deal
from nlscale.config.units import human_bytes


def fetch_newest(
    url: str, store: Store, group: dist.ProcessGroup | None, say: Callable[[str], None]
) -> Checkpoint | None:
    """Bring the newest whole checkpoint of a mirror into a store that has none at all.

    Collective over the group. What it writes is an ordinary checkpoint of the store from then on.

    Args:
        url: of the mirror, which is this run's.
        store: in a folder that all ranks see.
        group: a gloo group whose timeout exceeds what the slowest rank takes for its part; None:
            this process alone.
        say: takes lines on what is fetched and passed over; called on the first rank.

    Returns:
        None where the store has a checkpoint, whole or not, or the mirror none.

    Raises:
        CheckpointError: on every rank: the mirror's are all broken, or a rank could not fetch its
            part; the store stays as it was.
    """
    return _Fetch(url, store, group, say).run()


class _Fetch:
    """One rank's part."""

    def __init__(
        self,
        url: str,
        store: Store,
        group: dist.ProcessGroup | None,
        say: Callable[[str], None],
    ) -> None:
        self._url, self._store, self._say = url, store, say
        self._ranks = Ranks(group, self._describe, self._undo)
        self._what = "a checkpoint"
        # of the checkpoint that is being fetched
        self._folder = ""
        self._partial = store.folder
        self._text = b""
        self._listed: dict[str, Digest] = {}

    def run(self) -> Checkpoint | None:
        """See `fetch_newest`."""
        broken = []
        steps = self._ranks.first(self._candidates)
        for number, step in enumerate(steps):
            started = time.monotonic()
            problem = self._fetch(step)
            if problem is None:
                size = sum(digest.bytes for digest in self._listed.values())
                seconds = time.monotonic() - started
                self._tell(
                    f"checkpoint of step {step} fetched from {self._url}: {human_bytes(size)} in "
                    f"{seconds:.1f} s"
                )
                return Checkpoint(self._store.folder / self._folder, step)
            broken.append(problem)
            older = steps[number + 1 :]
            left = f"trying step {older[0]}" if older else "no other is left"
            self._tell(f"checkpoint of step {step} in the mirror is broken, {left}: {problem}")
        if broken:
            raise CheckpointError(
                f"none of the {len(broken)} checkpoints in {self._url} is whole: "
                f"{'; '.join(broken)}; begin anew with another checkpoint.mirror, or null"
            )
        return None

    def _candidates(self) -> list[int]:
        """Steps in the order in which to try them: from the one copied last down.

        Newer ones are of a way that the run has not gone on with, and are the last resort.
        """
        if self._store.checkpoints():
            return []
        remote = Remote(self._url)
        steps = finished(remote)[::-1]
        latest = step_of((remote.find(LATEST) or b"").decode("ascii", "replace").strip())
        newer = [step for step in steps if latest is not None and step > latest]
        return [step for step in steps if step not in newer] + newer

    def _fetch(self, step: int) -> str | None:
        """Fetch one; what is wrong with it in the mirror, None: nothing."""
        self._folder, self._what = folder_of(step), f"the checkpoint of step {step}"
        self._partial = self._store.folder / f"{self._folder}.partial"
        told: tuple[str | None, bytes] = self._ranks.first(lambda: self._open(step))
        problem, self._text = told
        if problem is not None:
            return problem
        self._listed = _listed(self._name(MANIFEST), self._text)
        found = self._ranks.each(self._fetch_share)
        return self._ranks.first(lambda: self._finish([one for part in found for one in part]))

    def _open(self, step: int) -> tuple[str | None, bytes]:
        """Look at the manifest and make the folder; what is wrong with it, and its bytes."""
        remote = Remote(self._url)
        try:
            text = remote.read(f"{self._folder}/{MANIFEST}")
            listed = _listed(self._name(MANIFEST), text, step)
        except (CheckpointError, Missing) as error:
            return str(error), b""
        there = remote.listing().get(step, {})
        wrong = [
            f"{name} has {there.get(name, 'no')} bytes instead of {digest.bytes}"
            for name, digest in listed.items()
            if there.get(name) != digest.bytes
        ]
        if wrong:
            return f"{self._url}/{self._folder}: {'; '.join(wrong)}", b""
        folder, needed = self._store.folder, sum(digest.bytes for digest in listed.values())
        self._tell(
            f"no checkpoint in {folder}: fetching that of step {step} from {self._url}, "
            f"{human_bytes(needed)}"
        )
        if not folder.exists():
            files.make_folder(folder)
            files.sync_folder(folder.parent)
        if self._partial.exists():
            files.remove_folder(self._partial)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        files.make_folder(self._partial)
        return None, text

    def _fetch_share(self) -> list[str]:
        """Fetch this rank's files; those that are broken in the mirror."""
        sizes = {name: digest.bytes for name, digest in self._listed.items()}
        mine = deal(sizes, self._ranks.size)[self._ranks.rank]
        if mine and not self._partial.is_dir():
            raise CheckpointError(
                f"{self._partial}, which the first rank made, is not there: "
                f"it must be on a file system that all nodes share"
            )
        remote, wrong = Remote(self._url), list[str]()

        def fetch(name: str) -> None:
            listed = self._listed[name]
            try:
                with files.create(self._partial / name) as file:
                    # a byte more than it may have is one too many
                    for piece in remote.download(f"{self._folder}/{name}", listed.bytes + 1):
                        file.write(piece)
            except Missing as error:
                wrong.append(str(error))
                return
            if file.digest != listed:
                wrong.append(f"{self._name(name)} was altered: it is not what its manifest lists")

        for_each(fetch, mine)
        return wrong

    def _finish(self, wrong: list[str]) -> str | None:
        if wrong:
            self._undo()
            return "; ".join(sorted(wrong))
        files.write(self._partial / MANIFEST, self._text)
        files.sync_folder(self._partial)
        final = self._store.folder / self._folder
        files.rename(self._partial, final)
        files.sync_folder(self._store.folder)
        files.replace(self._store.folder / NEWEST, f"{self._folder}\n".encode())
        return None

    def _name(self, name: str) -> str:
        return f"{self._url}/{self._folder}/{name}"

    def _tell(self, line: str) -> None:
        if self._ranks.rank == 0:
            self._say(line)

    def _undo(self) -> None:
        with suppress(OSError):  # what cannot be undone either is left to the next start
            if self._folder and self._partial.exists():
                files.remove_folder(self._partial)

    def _describe(self, failures: list[Failure]) -> str:
        one = failures[0]
        who = f"{one.who}: " if one.who else ""
        return (
            f"cannot fetch {self._what} from checkpoint.mirror {self._url}: {who}{one.reason}; "
            f"mend that and start again, or checkpoint.mirror=null"
        )


def _listed(name: str, text: bytes, step: int | None = None) -> dict[str, Digest]:
    """The files that a manifest lists. Raises CheckpointError: altered, or of another step."""
    found = manifest.parse(name, text)
    if step is not None and found["step"] != step:
        raise CheckpointError(f"{name} is of step {found['step']}")
    return {name: Digest(**entry) for name, entry in found["files"].items()}
