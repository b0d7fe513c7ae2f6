"""Operations compiled ahead: what is missing, or for another machine, is said in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_a_library_that_cannot_be_loaded_is_a_line(folder: Path) -> None:
    note(folder)
    with pytest.raises(UserError, match=r"cannot be loaded \(.*\); run .*--build cpu_adam` again"):
        compiled.load("cpu_adam")


def test_a_missing_compiler_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match=r"cpu_adam needs g\+\+, which is not there; install g\+\+"):
        compiled.build("cpu_adam", print)
