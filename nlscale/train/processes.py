"""A run in processes of its own on this machine, started from Python and waited for.

Each rank is an operating system process in a session of its own, so that Ctrl-C reaches the caller
alone, which hands it on once. Under torchrun all exit codes become 1, so torchrun is not used: the
ranks get the environment that it would give them.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nlscale.cluster.life.place import VARIABLES, alone
from nlscale.cluster.life.signals import handled
from nlscale.config import recipe as recipes
from nlscale.errors import GaveUp, LostRank, Stopped, TrainingFailed, UserError
from nlscale.train.folder import Run, read

_ERRORS = {e.exit_code: e for e in (UserError, TrainingFailed, GaveUp, LostRank, Stopped)}
_POLL_SECONDS = 0.05
OTHERS_SECONDS = 90.0
"""For which the others may go on when a rank has failed: those that have met it end before."""
MOST_REASON_BYTES = 1 << 15
"""Of a reason; a pipe holds as much without a reader."""


def start(recipe: str | Path, overrides: Sequence[str], ranks: int, imports: Sequence[str]) -> Run:
    """See `nlscale.start`."""
    if ranks < 1:
        raise UserError(f"ranks={ranks}; a run has 1 or more")
    alone("nlscale.start")
    modules = [f"run.imports=[{','.join(imports)}]"] if imports else []
    config = recipes.load(recipe, [*overrides, *modules], trusted=True).config
    named = [f"--import={module}" for module in imports]
    with _told_to_end() as told:
        reasons: list[int] = []
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for environment in _environments(ranks):
                process, reason = _start(environment, ["train", str(recipe), *overrides, *named])
                processes.append(process)
                reasons.append(reason)
            ended = _wait(processes, told)
        finally:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()  # one that still runs stops then, with a checkpoint
            for process in processes:
                process.wait()
            why = [_read(reason) for reason in reasons]
    _raise(ended, why)
    return read(config.run.dir)


def _start(environment: dict[str, str], asked: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A rank, and the end of the pipe into which it says why it ends."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "nlscale.train.child", str(writing), *asked],
            env=environment,
            stdin=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[writing],
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return process, reading


def _read(reason: int) -> str:
    """What a rank that has ended has left in its pipe; closes it."""
    os.set_blocking(reason, False)
    with open(reason, "rb", buffering=0) as pipe:
        return (pipe.read(2 * MOST_REASON_BYTES) or b"").decode("utf-8", errors="replace")


@contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """The signals that come and would end this process: it ends by the first, after the body.

    One that the caller handles, or ignores as under nohup, is left to them.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    ends = (signal.SIGTERM, signal.SIGHUP)
    fatal = tuple(n for n in ends if signal.getsignal(n) is signal.SIG_DFL)
    try:
        with handled(fatal, note):
            yield came
    finally:
        if came:
            os.kill(os.getpid(), came[0])


def _environments(ranks: int) -> list[dict[str, str]]:
    """Of each rank, as torchrun makes it; of a single one as without torchrun."""
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if ranks == 1:
        return [own]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    shared = {"OMP_NUM_THREADS": threads} | own | world(ranks)
    return [as_rank(shared, rank) for rank in range(ranks)]


def world(ranks: int) -> dict[str, str]:
    """What torchrun tells all ranks of so many on this machine, which meet at a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def as_rank(shared: dict[str, str], rank: int) -> dict[str, str]:
    """That, and what torchrun tells one of them."""
    return shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _wait(processes: Sequence[subprocess.Popen[bytes]], told: list[int]) -> dict[int, int]:
    """Exit codes by rank, in the order in which they ended.

    Args:
        processes: by rank.
        told: signals that ask this process to end, as they come; the ranks are asked to stop.

    Raises:
        KeyboardInterrupt: one came, and all have ended.
    """
    ended: dict[int, int] = {}
    interrupted = handed_on = False
    others_until = float("inf")
    while len(ended) < len(processes):
        try:
            for rank, process in enumerate(processes):
                code = process.poll()
                if code is not None and rank not in ended:
                    ended[rank] = code
                    if code not in (0, Stopped.exit_code):
                        others_until = min(others_until, time.monotonic() + OTHERS_SECONDS)
            if time.monotonic() > others_until:
                for process in processes:
                    process.kill()
            if told and not handed_on:
                handed_on = True
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
            for process in processes:
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return ended


def _raise(ended: dict[int, int], reasons: list[str]) -> None:
    """Raise what the first rank that failed and knows why has said, if any failed."""
    failed = [rank for rank, code in ended.items() if code]
    if not failed:
        return
    rank = next((rank for rank in failed if reasons[rank]), failed[0])
    code = ended[rank]
    if reasons[rank]:
        raise _ERRORS.get(code, TrainingFailed)(reasons[rank])
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        raise LostRank(f"rank {rank} was killed by {name}{hint}")
    raise _ERRORS.get(code, TrainingFailed)(
        f"rank {rank} ended with exit code {code}; its output says why"
    )
