"""A rank that computes more slowly than the others is named, with its host."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import world
from train.test_train_run import records, run, small_data

from nlscale.model.decoder import Decoder


def slow_rank_2(overrides: list[str]) -> dict[str, object]:
    forward = Decoder.forward

    def slow(self: Decoder, *given: Any) -> object:
        if os.environ["RANK"] == "2":
            time.sleep(0.4)
        return forward(self, *given)

    Decoder.forward = slow  # type: ignore[method-assign, assignment]
    return run(overrides)


@pytest.mark.parametrize("function", [slow_rank_2, run])
def test_a_straggler_is_named_once(tmp_path: Path, function: object) -> None:
    (tmp_path / "text").mkdir()
    data = small_data(tmp_path / "text", documents=8, held_out=0.2)
    here = [f"data.dir={data}", f"run.dir={tmp_path / 'run'}", "parallel.straggler_check_every=3"]
    world.run(4, function, here, ranks_per_node=2)  # type: ignore[arg-type]
    compared = [r for r in records(tmp_path / "run", "train") if "ranks" in r]
    assert [r["step"] for r in compared] == [3, 6, 9]
    log = (tmp_path / "run" / "train.log").read_text()
    for record in compared:
        ranks = record["ranks"]
        assert (
            0
            < ranks["fastest"]
            <= ranks["median"]
            <= ranks["slowest"]
            <= record["step_seconds"] * 3
        )
        if function is slow_rank_2:
            assert ranks["slowest_rank"] == 2 and ranks["slowest"] > 0.4
            # the others do not wait inside what is measured
            assert ranks["median"] < 0.35
    if function is slow_rank_2:
        assert log.count("rank 2 on ") == 1 and "is slow: it computes" in log
