"""Operations of DeepSpeed in C++, compiled ahead by `nlscale doctor --build` and loaded by ranks.

DeepSpeed compiles an operation where it is first used, which takes minutes of all ranks at once.
Here a run that needs one that is not there, or was compiled for another torch, another DeepSpeed or
another CPU, is refused before it starts, and ranks load the library alone: DeepSpeed itself is
imported to compile, and by `async_io` at its first write, to warn that drives wear out. No torch is
imported to look.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nlscale.errors import UserError


@dataclass(frozen=True)
class _Op:
    """An operation."""

    builder: str
    """Class of `deepspeed.ops.op_builder` that compiles it."""
    serves: str
    """Key that needs it."""
    before: str | None = None
    """Of another library, whose symbols it looks for; it is compiled and loaded with it."""


OPS = {
    "cpu_adam": _Op("CPUAdamBuilder", "update=cpu"),
    "async_io": _Op("AsyncIOBuilder", "memory=nvme", before="PinMemoryBuilder"),
}
"""By DeepSpeed's names."""


def _folder() -> Path:
    """Where torch compiles extensions; beside them lies what is known of those compiled here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def _versions() -> dict[str, str]:
    """Of all that a library compiled here depends on."""
    flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line]
    wide = {"avx2", "avx512f", "avx512vnni", "amx_tile"} & {*" ".join(flags[:1]).split()}
    return {
        "deepspeed": version("deepspeed"),
        "torch": version("torch"),
        "python": platform.python_version().rpartition(".")[0],
        "cpu": " ".join([platform.machine(), *sorted(wide)]),
    }


def check(name: str) -> dict[str, str]:
    """Whether an operation can be loaded here: of it and what it needs, where the libraries lie.

    Returns:
        Paths by the names of their modules, in the order of loading.

    Raises:
        UserError: it is not compiled, or for other versions.
    """
    command = f"nlscale doctor --build {name}"
    needs = f"{OPS[name].serves} needs DeepSpeed's operation {name}"
    try:
        found = json.loads((_folder() / f"nlscale-{name}.json").read_text())
        libraries, was = dict(found["libraries"]), dict(found["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        libraries, was = {}, {}
    if not libraries or not all(Path(path).is_file() for path in libraries.values()):
        raise UserError(
            f"{needs}, which is not compiled in {_folder()}; run `{command}` on a machine of this "
            f"kind (minutes)"
        )
    now = _versions()
    other = [
        f"{key} {was.get(key)}, here is {own}" for key, own in now.items() if was.get(key) != own
    ]
    if other:
        raise UserError(
            f"{needs}, and what is compiled in {_folder()} is for {other[0]}; run `{command}` again"
        )
    return libraries


def load(name: str) -> Any:
    """The module of an operation; in a process it is loaded once.

    Raises:
        UserError: see `check`; or it cannot be loaded.
    """
    libraries = check(name)
    module = [*libraries][-1]
    if module in sys.modules:
        return sys.modules[module]
    import torch  # noqa: F401  # whose libraries it is linked to

    try:
        for path in libraries.values():
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL if path != libraries[module] else 0)
        spec = importlib.util.spec_from_file_location(module, libraries[module])
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except (ImportError, OSError) as error:
        raise UserError(
            f"DeepSpeed's operation {name} cannot be loaded ({_line(error)}); run "
            f"`nlscale doctor --build {name}` again"
        ) from error
    sys.modules[module] = loaded
    return loaded


def build(name: str, say: Callable[[str], None]) -> None:
    """Compile an operation and what it needs with DeepSpeed, and note for what.

    Args:
        name: of `OPS`.
        say: takes a line on what is done.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    scripts = str(
        Path(sys.executable).parent
    )  # where pip has put ninja, of a Python on no PATH too
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])
    for tool, package in (("g++", "g++"), ("ninja", "ninja-build, or `pip install ninja`")):
        if shutil.which(os.environ.get("CXX", tool) if tool == "g++" else tool) is None:
            raise UserError(
                f"compiling DeepSpeed's operation {name} needs {tool}, which is not there; "
                f"install {package}"
            )
    say(f"compiling {name} of DeepSpeed {version('deepspeed')}; it takes minutes")
    known, libraries = _folder() / f"nlscale-{name}.json", {}
    try:
        from deepspeed.ops import op_builder

        with _alone(say):
            for part in filter(None, (OPS[name].before, OPS[name].builder)):
                module = getattr(op_builder, part)().load(verbose=False)
                libraries[module.__name__] = module.__file__
    except Exception as error:
        raise UserError(
            f"DeepSpeed's operation {name} could not be compiled: {_line(error)}"
        ) from error
    partial = known.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"libraries": libraries, "versions": _versions()}, indent=1))
    os.replace(partial, known)
    say(f"{name}: {libraries[[*libraries][-1]]}")


@contextmanager
def _alone(say: Callable[[str], None]) -> Iterator[None]:
    """torch compiles into a folder of ours, where no other process does so meanwhile.

    torch marks a folder in which it compiles by a file, and waits where there is one: for ever, if
    it is of a process that was killed. Here one waits for the system's lock, which no process keeps
    beyond its end, and what marks there are then are of processes that ended.
    """
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = _folder() / f"nlscale-torch{version('torch')}-{python}"
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with open(folder / "compiling", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process compiles in {folder}; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for mark in folder.glob("*/lock"):
            mark.unlink()
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        try:
            yield
        finally:
            del os.environ["TORCH_EXTENSIONS_DIR"]
            if before is not None:
                os.environ["TORCH_EXTENSIONS_DIR"] = before


def _line(error: Exception) -> str:
    """What a compiler, or a loader, said first of what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower()]
    return (wrong[1:] or wrong or lines or [type(error).__name__])[0][:300]
