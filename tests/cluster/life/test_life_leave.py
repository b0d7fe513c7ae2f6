"""The end of a process: quick, and with all that an end does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = "from nlscale.cluster.life.exits import leave\nimport sys\n"


def ends(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(("code", "then"), [("None", 0), ("0", 0), ("75", 75)])
def test_the_exit_code_is_that_of_the_error(code: str, then: int) -> None:
    assert ends(f"leave(SystemExit({code}))").returncode == then


def test_a_text_is_said_and_is_a_failure() -> None:
    ended = ends("leave(SystemExit('needs another module'))")
    assert (ended.returncode, ended.stderr) == (1, "needs another module\n")


def test_threads_hooks_and_streams_come_first() -> None:
    program = """
import atexit, ctypes, threading, time
def slow():
    time.sleep(0.3)
    print("thread")
atexit.register(lambda: print("hook"))
threading.Thread(target=slow).start()
ctypes.CDLL(None).puts(b"from C")
sys.stdout.write("no end of line, ")
leave(SystemExit(3))
"""
    ended = ends(program)
    assert ended.returncode == 3
    assert "from C\n" in ended.stdout
    assert ended.stdout.replace("from C\n", "") == "no end of line, thread\nhook\n"


def test_an_extension_that_ends_the_process_with_a_text_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys\nsys.exit('this module needs another')\n")
    ended = subprocess.run(
        [sys.executable, "-m", "nlscale", "--import", "ends", "recipe", "list"],
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert ended.returncode == 1 and "this module needs another" in ended.stderr
