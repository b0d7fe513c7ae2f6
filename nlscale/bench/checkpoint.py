"""`nlscale bench checkpoint`: what saving costs a run here, and getting back what was saved."""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nlscale.bench.tokens import random_tokens
from nlscale.checkpoint.restore import restore
from nlscale.checkpoint.saver import Saver
from nlscale.checkpoint.store.store import Checkpoint, Store, Written
from nlscale.checkpoint.store.together import Ranks
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Config, Pending
from nlscale.errors import TrainingFailed, UserError
from nlscale.levels.groups import group_parameters
from nlscale.levels.kept import kept_by_group
from nlscale.levels.spectrum import levels_of
from nlscale.parallel.layout import Layout, process_groups
from nlscale.step.trainer import Trainer

_WARM_UP = 2
_SAVES = 3


def bench_checkpoint(config: Config, steps: int, out: Path | None) -> dict[str, Any]:
    """Take steps on random tokens, save after each of the last ones, verify and load.

    Args:
        config: its `run.dir` says on which disk: the checkpoints go to a temporary folder beside
            it.
        steps: to time; levels of a longer period have not updated then.
        out: where to write and keep the checkpoints instead.

    Returns:
        Medians over the saves, of the slowest rank: `stall_seconds`, for which training waits
        (the copy to host memory, and the reduction of pending windows across nodes), and
        `write_seconds`, in the background; `bytes_per_second` of the writing.
        Of the last checkpoint: `bytes` and `files` on the disk; `theoretical_bytes`: 4 a parameter
        (fp32 weights), what its rule keeps where it has updated (8 of Adam's moments) and 4 where
        its window is pending (of each node with checkpoint.pending=exact); `ratio` of these;
        `largest_file_ratio`, the largest file of tensors over the mean; `verify_seconds` and
        `load_seconds`, read back at once and so, where they fit, from the system's cache;
        `read_ratio`, bytes that all ranks read to load it over those on the disk (None where the
        system does not count them).
        `median_step_seconds` without saves, `parameters`, `pending_parameters`, `saves`, `ranks`,
        `device`, `dtype`, and the `folder`, None where it was temporary.

    Raises:
        UserError: `model.vocabulary` is not set (no data are read), or `out` exists.
        TrainingFailed: a checkpoint could not be written.
    """
    if config.model.vocabulary is None:
        raise UserError("bench checkpoint reads no data: give model.vocabulary=256, for example")
    if out is not None and out.exists():
        raise UserError(f"--out {out} exists; give another folder")
    before = _WARM_UP + steps
    # the last step of a run closes all windows; this run is longer, so that some are pending
    config = at_stage(config, largest(config))
    longer = max(config.train.steps, before + _SAVES + 1)
    config = replace(config, train=replace(config.train, steps=longer))
    with process_groups(config) as layout, _folder(config, out, layout) as folder:
        trainer = _build(config, layout)
        seconds = [_take_step(trainer) for _ in range(before)]
        written, stall, write = _save(trainer, folder)
        held = _held(trainer)
        checkpoint = Checkpoint(written.path, trainer.counters.step)
        del trainer  # the loaded one takes its place
        gc.collect()
        verify, load, read = _read_back(config, layout, checkpoint)
        sizes = [path.stat().st_size for path in checkpoint.path.glob("*.distcp")]
        return {
            "stall_seconds": stall,
            "write_seconds": write,
            "bytes_per_second": written.bytes / write,
            "bytes": written.bytes,
            "files": written.files,
            "theoretical_bytes": held["theoretical_bytes"],
            "ratio": written.bytes / held["theoretical_bytes"],
            "largest_file_ratio": max(sizes) * len(sizes) / sum(sizes),
            "verify_seconds": verify,
            "load_seconds": load,
            "read_ratio": None if read is None else read / written.bytes,
            "median_step_seconds": float(np.median(seconds[_WARM_UP:])),
            "parameters": held["parameters"],
            "pending_parameters": held["pending_parameters"],
            "saves": _SAVES,
            "ranks": layout.world,
            "device": layout.device.type,
            "dtype": config.train.dtype.value,
            "folder": str(out) if out is not None else None,
        }


def print_result(result: dict[str, Any]) -> None:
    """Print what `bench_checkpoint` returns."""
    share = result["stall_seconds"] / result["median_step_seconds"]
    pending = human_count(result["pending_parameters"])
    size, planned = human_bytes(result["bytes"]), human_bytes(result["theoretical_bytes"])
    ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
    read = result["read_ratio"]
    read = "" if read is None else f", {read:.3f} x what is on the disk was read"
    rows = {
        "training waits": f"{_time(result['stall_seconds'])}, {share:.2g} of a step's "
        f"{_time(result['median_step_seconds'])}",
        "writing": f"{_time(result['write_seconds'])} in the background, "
        f"{human_bytes(result['bytes_per_second'])}/s",
        "on the disk": f"{size} in {result['files']} files, {result['ratio']:.3f} x the {planned} "
        f"of the state",
        "largest file": f"{result['largest_file_ratio']:.3f} x the mean",
        "verifying": f"{_time(result['verify_seconds'])}",
        "loading": f"{_time(result['load_seconds'])}{read}",
    }
    print(
        f"{human_count(result['parameters'])} parameters ({pending} with a pending window), "
        f"{ranks} on {result['device']}, median of {result['saves']} saves\n"
    )
    for name, text in rows.items():
        print(f"{name:<16}{text}")
    if result["folder"] is not None:
        print(f"\n{result['folder']}")


def _build(config: Config, layout: Layout, draws: bool = True) -> Trainer:
    assert config.model.vocabulary is not None
    return Trainer.build(config, layout, levels_of(config), config.model.vocabulary, draws)


def _take_step(trainer: Trainer) -> float:
    layout, step = trainer.layout, trainer.counters.step + 1
    batches = random_tokens(trainer.config, step, layout.data_rank, layout.data_size, layout.device)
    started = _now(layout)
    verdict, _ = trainer.take_step(batches)
    if not verdict.admitted:
        raise TrainingFailed(f"step {step} was not finite; nothing was measured")
    return _now(layout) - started


def _save(trainer: Trainer, folder: Path) -> tuple[Written, float, float]:
    """Save after each of some steps: the last, and median seconds of stall and of writing."""
    saver = Saver(trainer, {"random": True}, None, Store(folder), lambda line: None)
    stalls, writes = [], []
    for _ in range(_SAVES):
        _take_step(trainer)
        saver.save()
        saver.finish()  # the group of `_slowest` is the writer's until then
        assert saver.written is not None
        stalls.append(_slowest(trainer.layout, saver.take_stalled()))
        writes.append(_slowest(trainer.layout, saver.written.seconds))
    assert saver.written is not None
    return saver.written, float(np.median(stalls)), float(np.median(writes))


def _read_back(
    config: Config, layout: Layout, checkpoint: Checkpoint
) -> tuple[float, float, float | None]:
    """Seconds of verifying and of loading, by all ranks, and bytes that these read to load it."""
    started = _now(layout)
    checkpoint.verify(Ranks(layout.host))
    verify = _slowest(layout, _now(layout) - started)
    trainer = _build(config, layout, draws=False)
    dist.barrier(group=layout.host)
    before, started = _bytes_read(), _now(layout)
    restore(trainer, checkpoint)
    seconds, after = _now(layout) - started, _bytes_read()
    read = None
    if before is not None and after is not None:
        total = torch.tensor(after - before, dtype=torch.float64)
        dist.all_reduce(total, group=layout.host)
        read = float(total)
    return verify, _slowest(layout, seconds), read


def _bytes_read() -> float | None:
    """By system calls of this process."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return float(dict(line.split(": ") for line in lines)["rchar"])


def _held(trainer: Trainer) -> dict[str, int]:
    """What a checkpoint of the trainer must hold, of all ranks."""
    config, progress = trainer.config, trainer.optimizer.progress
    assert config.model.vocabulary is not None
    sizes = group_parameters(config, trainer.levels, config.model.vocabulary, config.levels.stagger)
    total = sum(sizes.values())
    pending = sum(size for group, size in sizes.items() if progress[group].tokens)
    exact = config.checkpoint.pending == Pending.exact
    copies = trainer.layout.nodes if exact else 1
    by_group = kept_by_group(config, trainer.levels, config.model.vocabulary)
    kept = sum(size for group, size in by_group.items() if progress[group].updates)
    return {
        "parameters": total,
        "pending_parameters": pending,
        "theoretical_bytes": 4 * total + kept + 4 * copies * pending,
    }


@contextlib.contextmanager
def _folder(config: Config, out: Path | None, layout: Layout) -> Iterator[Path]:
    """A folder that all ranks see, chosen by the first; removed afterwards, unless it was given."""
    if out is not None:
        yield out
        return
    beside = Path(config.run.dir).absolute().parent
    while not beside.exists():
        beside = beside.parent
    made = [tempfile.mkdtemp(prefix="nlscale-bench-", dir=beside) if layout.is_writer else None]
    try:
        dist.broadcast_object_list(made, src=0, group=layout.host)
        assert made[0] is not None
        yield Path(made[0])
        dist.barrier(group=layout.host)
    finally:
        if layout.is_writer and made[0] is not None:
            shutil.rmtree(made[0], ignore_errors=True)


def _slowest(layout: Layout, seconds: float) -> float:
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=layout.host)
    return float(most)


def _now(layout: Layout) -> float:
    if layout.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
