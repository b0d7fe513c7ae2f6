"""The shares of tasks, each in a process that knows the data folder alone, make the same build."""

from __future__ import annotations

from pathlib import Path

import pytest
from data.building.builds import UNIT, contents, corpus, units

from nlscale import cli
from nlscale.data.build import begun
from nlscale.data.building.share import SHARED, STEPS, progress_of, share, steps_left
from nlscale.data.building.work import TOKENS, Work
from nlscale.errors import UserError


def begin(sources: list[str], out: Path) -> Work:
    work = begun(
        sources, "bpe:270", out, held_out=0.2, shard_tokens=700, block_tokens=100, max_lost=0.5,
        unit_bytes=UNIT, duplicates="drop",
    )  # fmt: skip
    assert isinstance(work, Work)
    return work


@pytest.mark.parametrize("of", [1, 3])
def test_shares_are_the_build(tmp_path: Path, of: int) -> None:
    sources, out = corpus(tmp_path / "in", masks=True), tmp_path / "out"
    assert steps_left(begin(sources, out)) == list(STEPS)
    for step in STEPS:
        for task in range(1, (of if step in SHARED else 1) + 1):
            share(out, step, task, of if step in SHARED else 1, workers=1)
    units(sources, tmp_path / "whole", "bpe:270", duplicates="drop")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_share_that_is_missing_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    sources, out = corpus(tmp_path / "in"), tmp_path / "out"
    begin(sources, out)
    share(out, "survey", 1, 2, workers=1)
    with pytest.raises(UserError, match=r"survey-0000\d is missing.*same command again"):
        share(out, "settle", 1, 1, workers=1)
    assert "units are through the pass 'survey'" in progress_of(out)
    share(out, "survey", 2, 2, workers=1)
    share(out, "settle", 1, 1, workers=1)
    assert steps_left(begin(sources, out)) == [TOKENS, "finish"]
    # what tasks have made is what a machine of its own goes on from
    units(sources, out, "bpe:270", duplicates="drop")
    units(sources, tmp_path / "whole", "bpe:270", duplicates="drop")
    assert contents(out) == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="nothing is being built"):
        share(out, "finish", 1, 1, workers=1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--executor=slurm", "--tasks=2"], "--executor slurm needs --cluster"),
        (["--executor=slurm", "--cluster=test"], "--executor slurm needs --tasks"),
        (["--tasks=2"], "--executor slurm is what takes --tasks"),
        (["--cluster=test"], "--executor slurm is what takes --cluster"),
    ],
)
def test_what_belongs_to_slurm_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    build = ["data", "build", "--source", str(tmp_path / "a.txt"), "--tokenizer", "bytes"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*build, "--out", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_the_steps_are_named_where_there_is_no_such_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="survey, settle, tokens, finish"):
        share(tmp_path, "read", 1, 1, workers=1)
