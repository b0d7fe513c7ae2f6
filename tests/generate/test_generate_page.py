"""What the page on Python shows is run, in its order and in one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from generate.workplace import workplace

STARTED = """
import sys, torch
from nlscale import cli
try:
    cli.main(["generate", "runs/quickstart", "--tokens", "1"])
except SystemExit as end:
    assert not end.code
in_vain = {"torch._inductor", "wandb.sdk"} & set(sys.modules)
assert torch.cuda.is_available() or not in_vain, in_vain
"""
"""A command that generates imports no compiler, which takes as long as all that it needs."""
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-from-python.md"


def test_the_python_of_the_page_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join([STARTED, *blocks])],
        cwd=workplace(tmp_path), env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = ended.stdout
    assert "hope, 0.13M parameters, step 9" in said and "nats a token" in said
    assert "levels.slow.grad_norm" in said
    assert "step 6/6" in said and "failed" not in said
