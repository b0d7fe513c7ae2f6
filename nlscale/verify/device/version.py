"""Which nlscale it is that measures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nlscale


def version() -> str:
    """With the commit where it is run from its checkout, and + where that was changed since."""
    checkout = Path(nlscale.__file__).resolve().parents[1]
    root = _git(checkout, "rev-parse", "--show-toplevel")
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD")
    # an installed package may lie in the folder of somebody else's repository
    if root is None or commit is None or Path(root).resolve() != checkout:
        return nlscale.__version__
    changed = _git(checkout, "status", "--porcelain", "nlscale")
    return f"{nlscale.__version__} at {commit}{'+' if changed else ''}"


def _git(folder: Path, *words: str) -> str | None:
    try:
        ran = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()
