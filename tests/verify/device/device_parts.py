"""Parts of `nlscale bench device` that do what tests want of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nlscale.errors import UserError
from nlscale.verify.device.parts import Part


def part(name: str, does: str, most: float = 60.0, by_all: bool = False, **given: Any) -> Part:
    """One of the functions below."""
    return Part(name, f"it {does}", f"verify.device.device_parts:{does}", 1, most, given, by_all)


def is_named(folder: Path, tiny: bool, device: str = "a GPU") -> dict[str, Any]:
    """What the part `device` finds."""
    about: dict[str, Any] = {"device": device, "ranks": 1, "torch": "2", "triton": "3"}
    about |= {"sizes": "full", "ptxas": "13", "nlscale": "0.1.0"}
    host = f"host{os.environ.get('RANK', '0')}"
    return {**about, "host": host, "python": "3.11", "gpu": None, "says": device}


def works(folder: Path, tiny: bool) -> dict[str, Any]:
    """Says how often it has been called, by what it leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    calls = len(list(folder.iterdir())) + 1
    (folder / str(calls)).touch()
    print("some words")
    return {"calls": calls, "says": f"call {calls}"}


def fails(folder: Path, tiny: bool) -> dict[str, Any]:
    print("before it failed")
    raise UserError("the kernel is wrong")


def crashes(folder: Path, tiny: bool) -> dict[str, Any]:
    os.abort()


def fails_until_told(folder: Path, tiny: bool) -> dict[str, Any]:
    if not (folder.parent / "told").exists():
        raise RuntimeError("out of memory, say")
    return {"says": "now it works"}


def sleeps(folder: Path, tiny: bool) -> dict[str, Any]:
    """With a process of its own, which is to end with it."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        (folder / "pid").write_text(str(child))
    time.sleep(600)
    return {}


def leaves_a_process(folder: Path, tiny: bool) -> dict[str, Any]:
    """And dies of something else than the command."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if not child:
        time.sleep(600)
    (folder / "pid").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def fails_on_the_second(folder: Path, tiny: bool) -> dict[str, Any]:
    if os.environ["RANK"] == "1":
        raise UserError("this GPU has fallen off the bus")
    time.sleep(600)  # in a collective, say
    return {}


def knows_its_place(folder: Path, tiny: bool) -> dict[str, Any]:
    """That the ranks can meet where they are told, whatever the command does there."""
    import torch.distributed as dist

    from nlscale.config import recipe
    from nlscale.parallel.layout import process_groups

    with process_groups(recipe.load(None, ["data.dir=none"]).config) as layout:
        found: list[Any] = [None] * layout.world
        dist.all_gather_object(found, layout.rank)
    return {"ranks": found, "says": f"{layout.world} ranks"}
