"""What the runs of a sweep read, and the commands of its file that build it."""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nlscale.config.urls import is_url
from nlscale.data.tasks import PREFIX
from nlscale.data.tasks.table import task_of
from nlscale.data.tokenizer import ByteTokenizer
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
        words = _words(sweep, command)
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


def require_data(sweep: Sweep, data: str) -> None:
    """Refuse to go on without a data folder that the sweep knows how to build.

    Raises:
        UserError: it is missing; what builds it.
    """
    if sweep.build_data and not is_url(data) and not Path(data).exists():
        its_own = [text for text in sweep.build_data if data in text.split()]
        commands = " && ".join(its_own or sweep.build_data)
        raise UserError(f"no data at {data}; build it with: {commands} (--build-data does)")


def vocabulary_to_be(sweep: Sweep, data: str) -> int | None:
    """Ids of the task, or of the bytes, that `build_data` will make there.

    None where it makes something else, whose vocabulary is known once it has been made.

    Raises:
        UserError: no such task.
    """
    for command in sweep.build_data:
        given = dict(itertools.pairwise(_words(sweep, command)))
        if given.get("--out") != data:
            continue
        if given.get("--source", "").startswith(PREFIX):
            return len(task_of(given["--source"]).symbols)
        if given.get("--tokenizer") == ByteTokenizer.name:
            return ByteTokenizer.vocabulary
    return None


def _words(sweep: Sweep, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"{sweep.path}: build_data {command!r}: {error}; mend its quotes") from None
