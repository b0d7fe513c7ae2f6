"""What a mirror holds, for a person who asks."""

from __future__ import annotations

import json
from typing import Any

from nlscale.checkpoint.mirror.remote import LATEST, MANIFEST, MirrorError, Remote, folder_of
from nlscale.checkpoint.store import manifest
from nlscale.checkpoint.store.checkpoint import STATE
from nlscale.checkpoint.store.safe import CheckpointError
from nlscale.errors import UserError


def mirror_listing(remote: Remote) -> dict[str, Any]:
    """What `nlscale.checkpoint.inspection.listing` returns of a folder; `folder` is the URL.

    Raises:
        UserError: the service refuses, is gone, or no checkpoint there is finished.
    """
    found = remote.listing()
    finished = sorted(step for step, inside in found.items() if MANIFEST in inside)
    begun = [folder_of(step) for step in sorted(found.keys() - set(finished))]
    if not finished:
        left = f" (unfinished: {', '.join(begun)})" if begun else ""
        raise UserError(f"no finished checkpoint in {remote.url}{left}; give the mirror of a run")
    latest = (remote.find(LATEST) or b"").decode("ascii", "backslashreplace").strip() or None
    return {
        "folder": remote.url,
        "latest": latest,
        "checkpoints": [
            {**_summary(remote, step, found[step]), "latest": folder_of(step) == latest}
            for step in finished
        ],
        "unfinished": begun,
    }


def _summary(remote: Remote, step: int, inside: dict[str, int]) -> dict[str, Any]:
    name = folder_of(step)
    summary: dict[str, Any] = {
        "name": name,
        "step": step,
        "created": None,
        "tokens": None,
        "bytes": sum(inside.values()),
        "files": len(inside),
        "error": None,
    }
    try:
        text = remote.read(f"{name}/{MANIFEST}")
        summary["created"] = manifest.parse(f"{remote.url}/{name}/{MANIFEST}", text)["created"]
        summary["tokens"] = json.loads(remote.read(f"{name}/{STATE}"))["tokens"]
    except (CheckpointError, MirrorError) as error:
        summary["error"] = str(error)
    except (ValueError, KeyError, TypeError) as error:
        summary["error"] = f"{remote.url}/{name} is damaged: {error!r}"
    return summary
