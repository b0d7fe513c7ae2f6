"""The file that says what a checkpoint consists of, and that vouches for itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nlscale.checkpoint.store.files import Digest
from nlscale.checkpoint.store.safe import CheckpointError

NAME = "manifest.json"
_FORMAT = 1
_LONGEST = 200  # characters of a name
_DIGEST = "sha256"  # the last key: of the same text without it


def render(step: int, files: Mapping[str, Digest]) -> bytes:
    """The bytes of `manifest.json`, for a checkpoint finished now.

    Args:
        step: of training.
        files: every other file of the checkpoint by name.
    """
    return _bytes(
        {
            "format": _FORMAT,
            "step": step,
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "files": {
                name: {"bytes": digest.bytes, "sha256": digest.sha256}
                for name, digest in sorted(files.items())
            },
        }
    )


def parse(path: Path | str, data: bytes) -> dict[str, Any]:
    """The manifest in the bytes of a file or object, without its own sha256.

    Raises:
        CheckpointError: a byte of it was altered, or this nlscale does not know its format.
    """
    try:
        manifest = json.loads(data)
        manifest.pop(_DIGEST)
        whole = _bytes(manifest) == data and _is_listing(manifest)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} was altered: its contents are not those it has a sha256 of")
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')!r}, this nlscale reads {_FORMAT}; "
            f"read it with the nlscale that wrote it"
        )
    return manifest  # type: ignore[no-any-return]


def _is_listing(manifest: dict[str, Any]) -> bool:
    """Whether it is of a step and lists names in the folder itself, with what `Digest` wants."""
    return _is_count(manifest.get("step")) and all(
        _is_name(name)
        and isinstance(entry, dict)
        and set(entry) == {"bytes", "sha256"}
        and _is_count(entry["bytes"])
        and isinstance(entry["sha256"], str)
        for name, entry in manifest["files"].items()
    )


def _is_name(name: str) -> bool:
    """Whether it names a file in a folder; a NUL or half of a surrogate pair is in no name."""
    inside = "/" not in name and name not in ("", ".", "..")
    return inside and name.isprintable() and len(name) <= _LONGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _bytes(manifest: dict[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=1)
    own = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**manifest, _DIGEST: own}, indent=1) + "\n").encode()
