"""Processes that read samples side by side, as the ranks of a machine do, with nothing to train."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

from nlscale.data.reader import BatchReader, Samples
from nlscale.data.shards import TokenShards

_SEED = 0
_START_SECONDS = 120.0


def read_side_by_side(
    data: Path, sequence_length: int, micro_batch: int, seconds: float, processes: int
) -> float:
    """Samples a second that processes read together, micro batch by micro batch, masks too.

    Each reads every `processes`-th micro batch of the order of a run, as data-parallel ranks do.

    Args:
        data: the folder.
        sequence_length: tokens of a sample.
        micro_batch: samples that are read at a time.
        seconds: to go on for, after a micro batch that does not count.
        processes: side by side.

    Raises:
        UserError: the data are too few for a sample.
    """
    if processes == 1:
        return _read(data, sequence_length, micro_batch, seconds, 0, 1, lambda: None)
    Samples(TokenShards(data, "train", verify=False), sequence_length)  # says so here, if not
    context: Any = multiprocessing.get_context("forkserver")
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    team = [
        context.Process(
            target=_serve,
            args=(data, sequence_length, micro_batch, seconds, i, processes, barrier, results),
            daemon=True,
        )
        for i in range(processes)
    ]
    for process in team:
        process.start()
    for process in team:
        process.join()
    if any(process.exitcode for process in team):
        raise RuntimeError(f"a process that reads {data} ended with an error, which it has printed")
    return sum(results.get() for _ in team)


def _serve(
    data: Path, length: int, micro_batch: int, seconds: float, number: int, of: int,
    barrier: Any, results: Any,
) -> None:  # fmt: skip
    def together() -> None:
        barrier.wait(_START_SECONDS)

    try:
        results.put(_read(data, length, micro_batch, seconds, number, of, together))
    except BaseException:
        barrier.abort()  # or the others would wait for it
        raise


def _read(
    data: Path, length: int, micro_batch: int, seconds: float, number: int, of: int,
    together: Any,
) -> float:  # fmt: skip
    """Samples a second of one process, which is that `number` `of` all."""
    reader = BatchReader(Samples(TokenShards(data, "train", verify=False), length), _SEED)
    first, step, count = number * micro_batch, of * micro_batch, 0
    reader.read(first, micro_batch)
    together()
    started = time.perf_counter()
    while (now := time.perf_counter() - started) < seconds:
        first += step
        reader.read(first, micro_batch)
        reader.masks(first, micro_batch)
        count += micro_batch
    return count / now
