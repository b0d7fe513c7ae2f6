"""Worlds of ranks for tests: import once, fork, run a function on every rank.

`run(ranks, function, *args)` starts the ranks from a server process that has imported torch,
megatron-core and nlscale but never computed, so that a world is up in well under a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the server and so for the ranks
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["nlscale.train"])


def run(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    ranks_per_node: int | None = None,
    timeout: float = 120.0,
) -> list[Any]:
    """Call `function(*args)` on every rank; its results by rank.

    `function` must be importable (defined at the top of a module). A rank that raises ends the
    world, and the first traceback is the test's failure.
    """
    port = _free_port()
    processes, pipes = [], []
    for rank in range(ranks):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        environment = _environment(rank, ranks, ranks_per_node or ranks, port)
        process = _CONTEXT.Process(target=_rank, args=(theirs, environment, function, args))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(processes, pipes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: list[Any], pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), timeout)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} did not finish in {timeout} s")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                raise AssertionError(
                    f"rank {rank} ended without a result, exit code {processes[rank].exitcode}"
                ) from None
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    # plain pickle: multiprocessing's own would share a tensor's memory, which ends with this rank
    pipe.send_bytes(pickle.dumps(outcome))


def _environment(rank: int, ranks: int, per_node: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
