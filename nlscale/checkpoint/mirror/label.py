"""Whose checkpoints a mirror holds, so that two runs are never mixed in one.

`run.json` in the mirror has the id of a run, `mirror.json` in run.dir the same. A run whose folder
is gone has no id; it is known by its settings, as a folder of checkpoints is, and takes a new one:
the newest that does owns the mirror, and one that still wrote there stops.
"""

from __future__ import annotations

import json
import socket
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nlscale.checkpoint.mirror.remote import MANIFEST, MirrorError, Remote, folder_of
from nlscale.checkpoint.same_run import check_same_run
from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.checkpoint import STATE
from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError

RUN = "run.json"
FILE = "mirror.json"
"""In run.dir."""


class TakenOver(UserError):
    """The mirror belongs to another run by now."""


@dataclass(frozen=True)
class Label:
    """A mirror that belongs to this run."""

    remote: Remote
    text: bytes
    """What run.json holds."""

    def check(self) -> None:
        """See that the mirror still belongs to this run; label it again where it was emptied.

        Raises:
            TakenOver: another run has taken it.
            MirrorError: the service cannot be asked.
        """
        there = _parsed(self.remote.find(RUN))
        if there is None:
            self.remote.write(RUN, self.text)
        elif there["id"] != json.loads(self.text)["id"]:
            raise TakenOver(
                f"checkpoint.mirror {self.remote.url} was taken over by {_who(there)}: nothing "
                f"more is copied there"
            )


def take(config: Config, data: dict[str, Any], run_dir: Path, store: Store) -> Label | None:
    """Make the mirror this run's; None where there is none to be. Called by the first rank.

    Args:
        config: of the run.
        data: what identifies its data.
        run_dir: its folder, held by this process.
        store: of its checkpoints.

    Raises:
        UserError: the mirror holds another run's checkpoints, which stay as they are.
        MirrorError: the service refuses something or is gone.
    """
    if config.checkpoint.mirror is None:
        return None
    remote = Remote(config.checkpoint.mirror)
    there, own = _parsed(remote.find(RUN)), _own(run_dir)
    if there is not None and there["id"] == own:
        return Label(remote, _rendered(there))
    steps = finished(remote)
    if own is not None and there is not None:
        raise _another(remote, there)
    if store.checkpoints():
        if (there is not None or steps) and not _share_one(remote, steps, store):
            raise _another(remote, there)
    elif steps or there is not None:
        _refuse_other_settings(config, data, remote, there, steps)
    made = {
        "id": own or uuid.uuid4().hex,
        "run_dir": str(run_dir.absolute()),
        "host": socket.gethostname(),
        "since": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "config": recipe.to_plain(config),
        "data": data,
    }
    label = Label(remote, _rendered(made))
    # In this order: ended in between, the next start has no id and asks again.
    remote.write(RUN, label.text)
    try:
        files.replace(run_dir / FILE, _rendered({"id": made["id"]}))
    except OSError as error:
        raise UserError(f"cannot write {run_dir / FILE}: {error.strerror}") from None
    return label


def finished(remote: Remote) -> list[int]:
    """The steps of which the mirror has a finished checkpoint, oldest first."""
    return sorted(step for step, inside in remote.listing().items() if MANIFEST in inside)


def _own(run_dir: Path) -> str | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        return str(json.loads((run_dir / FILE).read_bytes())["id"])
    return None


def _parsed(text: bytes | None) -> dict[str, Any] | None:
    """What run.json says; of one that is damaged, that it is nobody's that is known."""
    if text is None:
        return None
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            return found
    return {"id": ""}


def _share_one(remote: Remote, steps: list[int], store: Store) -> bool:
    """Whether some checkpoint is in both: of a folder that was brought back by hand."""
    for checkpoint in reversed(store.checkpoints()):
        with suppress(OSError):
            if checkpoint.step in steps:
                name = f"{folder_of(checkpoint.step)}/{MANIFEST}"
                if remote.find(name) == (checkpoint.path / MANIFEST).read_bytes():
                    return True
    return False


def _refuse_other_settings(
    config: Config,
    data: dict[str, Any],
    remote: Remote,
    there: dict[str, Any] | None,
    steps: list[int],
) -> None:
    """Of a run whose folder is gone, or that never was: does the mirror hold that very run."""
    name = f"{folder_of(steps[-1])}/{STATE}" if steps else RUN
    state: Any = there
    if steps:
        try:
            state = json.loads(remote.read(name))
        except ValueError:
            state = there  # the damage is said, and the one before taken, when it is fetched
        except MirrorError:
            state = there
            if there is None:
                raise
    try:
        check_same_run(config, data, state or {}, f"{remote.url}/{name}")
    except UserError as error:
        raise _another(remote, there, f": {error}") from None


def _another(remote: Remote, there: dict[str, Any] | None, why: str = "") -> UserError:
    who = f" of {_who(there)}" if there is not None and there["id"] else ""
    return UserError(
        f"checkpoint.mirror {remote.url} holds the checkpoints of another run{who}; give this run "
        f"a URL of its own, empty that one, or checkpoint.mirror=null{why}"
    )


def _who(there: dict[str, Any]) -> str:
    return f"{there.get('run_dir')} on {there.get('host')}, since {there.get('since')}"


def _rendered(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
