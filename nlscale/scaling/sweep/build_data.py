"""Building what the runs of a sweep read, by the commands that its file names."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nlscale.errors import UserError
from nlscale.scaling.sweep.spec import Sweep

_BEGINS = ["nlscale", "data", "build"]


def build_missing(sweep: Sweep, say: Callable[[str], None]) -> None:
    """Run each command; it does nothing where its data are there and what they would be.

    What it prints goes to standard error.

    Args:
        sweep: as read.
        say: takes a line for each.

    Raises:
        UserError: there are none, one is no `nlscale data build --out FOLDER`, or one failed.
    """
    if not sweep.build_data:
        raise UserError(f"{sweep.path} names no build_data; --build-data has nothing to build")
    for command in sweep.build_data:
        words = shlex.split(command)
        if words[:3] != _BEGINS or "--out" not in words[:-1]:
            raise UserError(
                f"{sweep.path}: build_data {command!r} is not `nlscale data build ... --out "
                f"FOLDER`; --build-data runs nothing else"
            )
        out = Path(words[words.index("--out") + 1])
        say(f"data: {out}")
        ran = subprocess.run([sys.executable, "-m", *words], stdout=sys.stderr, check=False)
        if ran.returncode:
            raise UserError(f"{command!r} ended with exit code {ran.returncode}; see above")
