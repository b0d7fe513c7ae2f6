"""A screen that breaks: commands end as they should, and nothing else breaks with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hangups import Terminal

PYTHON = f"{sys.executable} -m nlscale"
PRINTS = """
import os, sys, threading
from nlscale.cluster.life.exits import exit_with
from nlscale.telemetry import screen

def work():
    for i in range(3):
        print("line", i, flush=True)
        print("error", i, file=sys.stderr)
    thread = threading.Thread(target=print, args=("of a thread",), kwargs={"flush": True})
    thread.start()
    thread.join()
    print("last, and not flushed")
    open(sys.argv[1], "w").write(f"{screen.lost()}")
    return int(sys.argv[2])

exit_with(work, lambda: sys.argv[3] == "result")
"""


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it by bash; of a pipeline, the exit code of its first command."""
    script = f"{command}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, env=environment
    )


PLAN = "plan quickstart --cluster test model.vocabulary=256"


@pytest.mark.parametrize("verb", ["config --keys", "--help", PLAN])
def test_a_reader_that_has_enough_is_no_failure(verb: str, tmp_path: Path) -> None:
    ended = shell(f"{PYTHON} {verb} | head -c 1", tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "") and len(ended.stdout) == 1


@pytest.mark.parametrize("verb", ["config --keys", "--version", "config quickstart"])
def test_output_that_did_not_fit_on_the_disk_is_a_failure(verb: str, tmp_path: Path) -> None:
    ended = shell(f"{PYTHON} {verb} > /dev/full", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == (
        "nlscale: standard output could not be written (No space left on device); what arrived is "
        "not whole\n"
    )


def test_a_failure_keeps_its_own_exit_code(tmp_path: Path) -> None:
    assert shell(f"{PYTHON} train nowhere.yaml > /dev/full", tmp_path).returncode == 2
    assert shell(f"{PYTHON} train nowhere.yaml 2> /dev/full", tmp_path).returncode == 2
    assert shell(f"{PYTHON} config --keys 2> /dev/full", tmp_path).returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_give_their_numbers_to_no_file(closed: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    ended = shell(f"{sys.executable} prints.py out 7 result {closed}", tmp_path)
    assert ended.returncode == 7
    assert (tmp_path / "out").read_text() == "None", "what is printed went into no file"


@pytest.mark.parametrize("flag", ["", "-u"])
@pytest.mark.parametrize(
    ("onto", "why"),
    [("| head -n 1", "Broken pipe"), ("> /dev/full 2>&1", "No space left on device")],
)
def test_work_goes_on_to_its_end(flag: str, onto: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS.replace('"line", i', '"line" * 20000, i'))
    ended = shell(f"{sys.executable} {flag} prints.py out 75 result {onto}", tmp_path)
    assert ended.returncode == 75 and "Traceback" not in ended.stderr
    assert (tmp_path / "out").read_text() == why


@pytest.mark.parametrize("flag", ["", "-u"])
def test_a_screen_that_is_whole_gets_all_of_it_in_order(flag: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    ended = shell(f"{sys.executable} {flag} prints.py out 0 result 2>&1", tmp_path)
    lines = [text for i in range(3) for text in (f"line {i}", f"error {i}")]
    assert ended.stdout.splitlines() == [*lines, "of a thread", "last, and not flushed"]
    assert ended.returncode == 0


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS.replace("def work():", "def work():\n    input()"))
    terminal = Terminal()
    with open(terminal.path, "w") as screen:
        process = subprocess.Popen(
            [sys.executable, "prints.py", "out", "75", "result"],
            cwd=tmp_path, stdin=subprocess.PIPE, stdout=screen, stderr=screen,
        )  # fmt: skip
    terminal.close()
    process.communicate(b"go on\n", timeout=60)
    assert process.returncode == 75
    assert (tmp_path / "out").read_text() == "Input/output error"


NOT_BLOCKING = """
import os, sys
from nlscale.cluster.life.exits import exit_with
os.set_blocking(1, False)
exit_with(lambda: print("x" * 1_000_000) or 0, lambda: True)
"""


def test_a_pipe_that_somebody_made_not_to_block_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(NOT_BLOCKING)
    ended = shell(f"{sys.executable} prints.py | (sleep 0.3; wc -c)", tmp_path)
    assert (ended.returncode, ended.stdout.strip()) == (0, "1000001")
