"""A disk from which files come back slowly, and an evaluation that takes its time."""

from __future__ import annotations

import time
from pathlib import Path

from nlscale.checkpoint.store import files
from nlscale.checkpoint.store.files import Digest
from tests.cluster import nap

SECONDS = 5.0
_digest = files.digest


def digest(path: Path) -> Digest:
    """See `nlscale.checkpoint.store.files.digest`."""
    time.sleep(SECONDS)
    return _digest(path)


files.digest = digest
nap.SECONDS = 2.0
