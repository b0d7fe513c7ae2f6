"""Processes that own a folder, for the tests of `nlscale.cluster.life.owner`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nlscale.cluster.life import generations, owner

TESTS = Path(__file__).parents[2]


def start(function: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """A function of this file in a process of its own; it says a line when it is ready."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from cluster.life import owners\n"
        f"owners.{function}(*sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def hurry(silent: float = 1.0) -> None:
    """Beats and silences of fractions of a second."""
    owner.BEAT_SECONDS, owner.SILENT_SECONDS, owner.TRUST_SECONDS = 0.05, silent, 0.2


def own(folder: str, name: str = "") -> None:
    """Hold the folder until a line comes, then see whether it still does."""
    hurry()
    with owner.hold(Path(folder), "nlscale test", name=name) as owned:
        print("holds", flush=True)
        sys.stdin.readline()
        try:
            owned.check()
        except owner.LostOwnership as error:
            print(f"lost: {error}", flush=True)
        else:
            print("still", flush=True)


def contend(folder: str, rounds: str, begin: str) -> None:
    """Take each of several folders at the same moments as others do; one may be inside at a time.

    A line a round: `held` or `refused`.
    """
    print("ready", flush=True)
    for number in range(int(rounds)):
        place = Path(folder) / str(number)
        time.sleep(max(0.0, float(begin) + 0.1 * number - time.time()))
        try:
            with owner.hold(place, "nlscale test"):
                inside = os.open(place / "inside", os.O_CREAT | os.O_EXCL)
                time.sleep(0.04)
                os.close(inside)
                (place / "inside").unlink()
            print("held", flush=True)
        except owner.Held:
            print("refused", flush=True)


def killed_at(folder: str, operation: str) -> None:
    """Take the folder and let go of it, killed after so many operations; says how many it took."""
    left = int(operation)
    done: list[str] = []

    def count(name: str) -> None:
        done.append(name)
        if len(done) == left:
            os.kill(os.getpid(), signal.SIGKILL)

    generations.on_operation = count
    with owner.hold(Path(folder), "nlscale test"):
        pass
    print(len(done), flush=True)
