"""One part of `nlscale bench device`, in a process of its own.

It is forked from one that has imported torch and nlscale but never computed nor touched a GPU, so
that it is under way at once; what it breaks, or leaves in the device's memory, ends with it. It
writes to a log, in a session of its own, and leaves its result as a file.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from nlscale.cluster.life import place as here
from nlscale.cluster.life.exits import exit_with
from nlscale.cluster.life.place import without_place
from nlscale.errors import UserError
from nlscale.parallel.layout import take_gpu
from nlscale.telemetry.files import replace, to_json
from nlscale.verify.device.parts import Part


def measured(part: Part, scratch: Path, tiny: bool) -> dict[str, Any]:
    """What the part has found, as JSON will hold it; on the GPU of this rank, if it has one."""
    if torch.cuda.is_available():
        take_gpu(here.place())
    module, _, function = part.measure.partition(":")
    found: dict[str, Any] = getattr(importlib.import_module(module), function)(
        scratch, tiny, **part.given
    )
    return found


def live(
    part: Part, scratch: Path, tiny: bool, place: dict[str, str], log: Path, result: Path
) -> None:
    """The life of the process.

    Args:
        part: to be measured.
        scratch: where it may leave files.
        tiny: whether sizes are.
        place: what a launcher would tell it of its place among the ranks.
        log: of all that it prints.
        result: file that holds what it has found, if it has.
    """
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    environment = without_place(os.environ) | place
    os.environ.clear()
    os.environ.update(environment)

    def work() -> int:
        try:
            found = measured(part, scratch, tiny)
        except UserError as error:
            error.told = True  # each rank has a log of its own
            raise
        replace(result, to_json(found).encode())
        return 0

    exit_with(work)


def _end_with_the_command() -> None:
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os.killpg(0, signal.SIGKILL)
