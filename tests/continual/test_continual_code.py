"""The stream of the standard library's subjects: its texts are there, and it reads them."""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from nlscale.continual.stream import read_stream

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tools" / "corpora" / "stdlib_subjects.py"


def test_each_task_has_text_of_its_own_and_enough_of_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROGRAM, "--out", tmp_path], check=True, capture_output=True)
    stream = read_stream(ROOT / "recipes" / "streams" / "code.yaml")
    assert sorted(stream.tasks) == sorted(folder.name for folder in tmp_path.iterdir())
    library, seen = Path(sysconfig.get_path("stdlib")), set()
    for task in stream.tasks:
        texts = [file for file in (tmp_path / task).rglob("*") if file.is_file()]
        names = {file.relative_to(tmp_path / task) for file in texts}
        assert not names & seen
        seen |= names
        for name in names:
            assert (tmp_path / task / name).read_bytes() == (library / name).read_bytes()
        # of 150 steps of 1,024 bytes none is read twice, though files of any size are held out
        assert sum(file.stat().st_size for file in texts) * 0.5 > 150 * 1024
    built = [
        shlex.split(line) if isinstance(line, str) else line for line in stream.sweep.build_data
    ]
    for task, command in zip(stream.tasks, built, strict=True):
        assert command[command.index("--source") + 1] == f"data/code/{task}"
        assert command[command.index("--out") + 1] == f"data/code-{task}"
