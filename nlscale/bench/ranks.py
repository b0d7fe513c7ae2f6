"""Ranks on emulated nodes: torch is imported once, each rank is forked and moves to its node."""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nlscale.bench.netns import LINK, EmulatedNodes, is_alive
from nlscale.cluster.life.place import VARIABLES, alone
from nlscale.errors import SaidElsewhere, UserError

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_port = 29500


def run_ranks(nodes: EmulatedNodes, ranks_per_node: int, work: Callable[[], Any]) -> list[Any]:
    """Call `work` on every rank of every node; its results by rank.

    The environment of a rank is what torchrun would give it. `work` and what it returns must
    stand being forked and pickled. Ranks end with this process, however that ends.

    Raises:
        UserError: a rank raised one.
        RuntimeError: a rank failed otherwise; its traceback is the message.
    """
    global _port
    alone("a run on emulated nodes")
    _port += 1  # the last world's port may linger
    world = nodes.count * ranks_per_node
    sys.stdout.flush()
    sys.stderr.flush()
    with scratch() as out:
        children: dict[int, int] = {}
        parent = os.getpid()
        try:
            for rank in range(world):
                pid = os.fork()
                if pid == 0:
                    _rank(nodes, ranks_per_node, rank, world, work, out, parent)
                children[pid] = rank
            _wait(children, out)
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            for pid in children:
                os.waitpid(pid, 0)
        return [pickle.loads((out / f"{rank}.result").read_bytes()) for rank in range(world)]


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder; those of killed processes are removed first."""
    prefix = "nlscale-bench-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        if not is_alive(left.name.removeprefix(prefix).split("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        yield Path(folder)


def _wait(children: dict[int, int], out: Path) -> None:
    """Until all have ended well; `children` keeps those that still live."""
    while children:
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            rank = children.pop(pid)
            if status:
                # the others fail for want of this one: the first to fail has the cause
                raise _failure(rank, status, out)
        time.sleep(_POLL_SECONDS)


def _failure(rank: int, status: int, out: Path) -> Exception:
    errors = sorted(out.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        code = os.waitstatus_to_exitcode(status)
        return RuntimeError(f"rank {rank} ended with exit code {code} and said nothing")
    return pickle.loads(errors[0].read_bytes())


def _rank(
    nodes: EmulatedNodes,
    ranks_per_node: int,
    rank: int,
    world: int,
    work: Callable[[], Any],
    out: Path,
    parent: int,
) -> None:
    """The life of a rank; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the ranks
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        nodes.enter(rank // ranks_per_node)
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank % ranks_per_node),
            LOCAL_WORLD_SIZE=str(ranks_per_node),
            MASTER_ADDR=nodes.address(0),
            MASTER_PORT=str(_port),
            GLOO_SOCKET_IFNAME=LINK,
        )
        _write(out / f"{rank}.result", work())
        code = 0
    except SaidElsewhere as said:
        # whichever rank ends first, the parent has to say why
        error = UserError(str(said))
        error.exit_code = said.exit_code
        _write(out / f"{rank}.error", error)
    except UserError as error:
        _write(out / f"{rank}.error", error)
    except BaseException:
        _write(out / f"{rank}.error", RuntimeError(f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        sys.stderr.flush()
        os._exit(code)


def _write(path: Path, value: Any) -> None:
    # whole or not at all: the parent reads as soon as one rank has failed
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(value))
    partial.rename(path)
