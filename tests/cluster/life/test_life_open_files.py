"""A rank may open as many files as a run needs, or says what stands in the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import variables

from nlscale.cluster.life.open_files import needed

LIMITED = """
import os, resource, subprocess, sys
soft, hard, held, program = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
if held:  # the ranks are started by what has the store, as torchrun's agent
    sys.exit(subprocess.run([sys.executable, "-c", program]).returncode)
exec(program)
"""
ALLOW = """
import os, resource
from nlscale.cluster.life.open_files import allow
from nlscale.cluster.life.place import place
from nlscale.errors import UserError
try:
    allow(place())
except UserError as error:
    print(error)
else:
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    print(*resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE))
"""


def said(soft: int, hard: int, program: str = ALLOW, held: bool = False, **place: object) -> str:
    """What a rank with these limits prints."""
    environment = {name: str(value) for name, value in place.items()}
    argv = [sys.executable, "-c", LIMITED, str(soft), str(hard), str(int(held)), program]
    ended = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert not ended.stderr, ended.stderr
    return ended.stdout


def test_the_soft_limit_is_raised() -> None:
    first = said(256, 4000, **variables(rank=0, ranks=512, per_node=8))
    assert first.splitlines()[0] == "4000 4000"


@pytest.mark.parametrize("ranks", [512, 2048])
def test_a_hard_limit_that_is_too_low_is_refused_with_the_number_and_the_fix(ranks: int) -> None:
    wanted = needed(ranks, store=True)
    (line,) = said(256, wanted - 1, **variables(rank=0, ranks=ranks, per_node=8)).splitlines()
    assert (
        f"at most {wanted - 1:,} files" in line
        and f"{ranks:,} ranks the first needs {wanted:,}" in line
    )
    for fix in (f"ulimit -n {wanted}", "LimitNOFILE", "PropagateResourceLimits"):
        assert fix in line
    enough = said(256, wanted, **variables(rank=0, ranks=ranks, per_node=8))
    assert enough.splitlines()[0] == f"{wanted} {wanted}"
    other = said(256, wanted - 1, **variables(rank=8, ranks=ranks, per_node=8))
    assert "the first needs" in other, "it would wait for a first rank that does not come"


def test_the_limit_of_torchrun_which_has_the_store_is_raised_too() -> None:
    theirs = {"TORCHELASTIC_USE_AGENT_STORE": "True", **variables(rank=0, ranks=512, per_node=8)}
    enough = needed(512, store=True)
    assert said(256, enough, held=True, **theirs).splitlines() == [f"{enough} {enough}"] * 2


def test_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    program = f"""
import sys
from nlscale.cli import main
sys.stderr = sys.stdout
main(["train", "no-such-recipe.yaml", "run.dir={tmp_path / "run"}"])
"""
    line = said(256, 1024, program, **variables(rank=0, ranks=512, per_node=8))
    assert line.startswith("nlscale: rank 0 on ") and "1,024 files" in line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()
