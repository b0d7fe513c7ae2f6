"""Operations compiled ahead: what is missing, or for another machine, is said in a line."""

from __future__ import annotations

import fcntl
import json
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils import cpp_extension, file_baton

from nlscale.errors import UserError
from nlscale.ops import compiled


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def note(folder: Path, **other: str) -> Path:
    """As if an operation had been compiled here; its library is none."""
    library = folder / "cpu_adam.so"
    library.write_bytes(b"no library")
    versions = {**compiled._versions(), **other}
    known = {"libraries": {"cpu_adam": str(library)}, "versions": versions}
    (folder / "nlscale-cpu_adam.json").write_text(json.dumps(known))
    return library


def test_what_is_not_compiled_names_the_command(folder: Path) -> None:
    said = "update=cpu needs .* not compiled in .*; run `nlscale doctor --build cpu_adam`"
    with pytest.raises(UserError, match=said):
        compiled.check("cpu_adam")
    (folder / "nlscale-cpu_adam.json").write_text("{")
    with pytest.raises(UserError, match=said):
        compiled.load("cpu_adam")
    library = note(folder)
    assert compiled.check("cpu_adam") == {"cpu_adam": str(library)}
    library.unlink()
    with pytest.raises(UserError, match=said):
        compiled.check("cpu_adam")


@pytest.mark.parametrize("what", ["torch", "deepspeed", "python", "cpu"])
def test_what_is_compiled_for_another_machine_is_refused(folder: Path, what: str) -> None:
    note(folder, **{what: "another"})
    with pytest.raises(UserError, match=f"is for {what} another, here is .*; run .* again"):
        compiled.load("cpu_adam")


def test_a_library_that_cannot_be_loaded_is_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cpu_adam", raising=False)  # another test may have loaded it
    note(folder)
    with pytest.raises(UserError, match=r"cannot be loaded \(.*\); run .*--build cpu_adam` again"):
        compiled.load("cpu_adam")


def test_a_missing_compiler_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match=r"cpu_adam needs g\+\+, which is not there; install g\+\+"):
        compiled.build("cpu_adam", print)


@pytest.fixture
def marks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """DeepSpeed's builder of cpu_adam, down to the mark that torch sets where it compiles."""
    marks: list[Path] = []

    class Builder:
        def load(self, verbose: bool) -> ModuleType:
            at = Path(cpp_extension._get_build_directory("cpu_adam", verbose=verbose))
            marks.append(at / "lock")
            assert file_baton.FileBaton(str(at / "lock")).try_acquire(), "it would wait"
            module = ModuleType("cpu_adam")
            module.__file__ = str(at / "cpu_adam.so")
            (at / "cpu_adam.so").write_bytes(b"compiled")
            return module

    deepspeed = {name: ModuleType(name) for name in ("deepspeed", "deepspeed.ops")}
    deepspeed["deepspeed.ops"].op_builder = ModuleType("op_builder")
    deepspeed["deepspeed.ops"].op_builder.CPUAdamBuilder = Builder
    for name, module in deepspeed.items():
        monkeypatch.setitem(sys.modules, name, module)
    return marks


def test_what_was_killed_while_it_compiled_does_not_keep_others_waiting(
    folder: Path, marks: list[Path]
) -> None:
    compiled.build("cpu_adam", print)
    assert marks[0].exists()  # as a killed one leaves it
    compiled.build("cpu_adam", print)
    assert marks[0] == marks[1] and folder in marks[0].parents
    assert compiled.check("cpu_adam") == {"cpu_adam": str(marks[0].with_name("cpu_adam.so"))}
    assert compiled._folder() == folder


def test_one_process_at_a_time_compiles_and_others_say_that_they_wait(
    folder: Path, marks: list[Path]
) -> None:
    compiled.build("cpu_adam", print)
    said: list[str] = []
    waits = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            waits.set()

    other = threading.Thread(target=compiled.build, args=("cpu_adam", say))
    with open(marks[0].parent.parent / "compiling", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other.start()
        assert waits.wait(60) and len(marks) == 1
    other.join(60)
    assert len(marks) == 2 and [line.partition(" in ")[0] for line in said][1:2] == [
        "another process compiles"
    ]
