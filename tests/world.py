"""Worlds of ranks for tests: import once, fork, run a function on every rank.

`run(ranks, function, *args)` starts the ranks from a server process that has imported torch,
megatron-core and nlscale but never computed, so that a world is up in well under a second.

Their runs draw no figure (see `undrawn`) but where a test asks for it.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ports import free_port

os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the server and so for the ranks
_CONTEXT = multiprocessing.get_context("forkserver")


def ready() -> None:
    """Start the server, unless it runs: the library's own would draw the figures of its runs."""
    _CONTEXT.set_forkserver_preload(["nlscale.train.preload", "tests.undrawn"])
    forkserver.ensure_running()


def run(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    ranks_per_node: int | None = None,
    timeout: float = 120.0,
    figures: bool = False,
) -> list[Any]:
    """Call `function(*args)` on every rank; its results by rank.

    `function` must be importable (defined at the top of a module). A rank that raises ends the
    world, and the first traceback is the test's failure. With `figures`, runs draw theirs.
    """
    ready()
    port = free_port()
    processes, pipes = [], []
    for rank in range(ranks):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        environment = _environment(rank, ranks, ranks_per_node or ranks, port)
        process = _CONTEXT.Process(
            target=_rank, args=(theirs, environment, figures, function, args)
        )
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


@dataclass(frozen=True)
class Ended:
    """How a rank of `command` ended."""

    code: int
    """Its exit code; minus the signal that killed it."""
    output: str
    """What it wrote to stdout and stderr."""
    seconds: float
    """After `during` returned."""


def command(
    ranks: int,
    argv: list[str],
    folder: Path,
    during: Callable[[list[int]], None] = lambda pids: None,
    before: Callable[[], None] | None = None,
    ranks_per_node: int | None = None,
    started: int | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 120.0,
) -> list[Ended]:
    """Run `nlscale argv` on every rank, as torchrun would but without torchrun.

    Args:
        ranks: of the world.
        argv: the command.
        folder: for the ranks' output.
        during: called with the pids of the ranks while they run.
        before: called in every rank before the command; importable.
        ranks_per_node: as for `run`.
        started: start only so many of the ranks.
        environment: added to every rank's.
        timeout: seconds after which ranks that still run are the test's failure.
    """
    ready()
    port, processes = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank{rank}.out" for rank in range(started or ranks)]
    for rank, output in enumerate(outputs):
        variables = _environment(rank, ranks, ranks_per_node or ranks, port) | (environment or {})
        process = _CONTEXT.Process(target=_command, args=(argv, variables, str(output), before))
        process.start()
        processes.append(process)
    try:
        during([process.pid for process in processes])
        since, ended = time.monotonic(), [0.0] * len(processes)
        waiting = {process.sentinel: i for i, process in enumerate(processes)}
        while waiting:
            for sentinel in multiprocessing.connection.wait(list(waiting), timeout):
                ended[waiting.pop(sentinel)] = time.monotonic() - since  # type: ignore[arg-type]
            if time.monotonic() - since > timeout:
                said = [output.read_text() for output in outputs]
                raise AssertionError(f"ranks {sorted(waiting.values())} still run\n{said}")
        for process in processes:
            process.join()
        return [
            Ended(process.exitcode, output.read_text(), seconds)
            for process, output, seconds in zip(processes, outputs, ended, strict=True)
        ]
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
    pipe: Connection,
    environment: dict[str, str],
    figures: bool,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    if figures:
        from nlscale.telemetry import figures as figures_of_runs
        from nlscale.telemetry import run as telemetry

        telemetry.draw_loss = figures_of_runs.draw_loss
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    pipe.send_bytes(dumps(outcome))


class _Pickler(pickle.Pickler):
    """Tensors by their bytes.

    multiprocessing's own would share their memory, which ends with the rank; torch's writes each as
    a file of its own, a third of a millisecond to write and to read.
    """

    def reducer_override(self, given: Any) -> Any:
        import torch

        if type(given) is not torch.Tensor or given.requires_grad or given.device.type != "cpu":
            return NotImplemented
        flat = given.contiguous().reshape(-1).view(torch.uint8)
        return _tensor, (flat.numpy().tobytes(), given.dtype, given.shape)


def _tensor(held: bytes, dtype: Any, shape: Any) -> Any:
    import torch

    # bytearray: what one may write to
    if not held:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(held), dtype=dtype).view(shape)


def dumps(given: Any) -> bytes:
    """For `pickle.loads`, fast where there are many small tensors on the CPU."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(given)
    return file.getvalue()


def _command(
    argv: list[str],
    environment: dict[str, str],
    output: str,
    before: Callable[[], None] | None,
) -> None:
    import torch

    from nlscale import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before is not None:
        before()
    cli.main(argv)


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
