"""Ranks that were told different things do not train together."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import world
from cluster.life.test_life_watch import train
from train.test_train_run import small_data

import nlscale
from nlscale import cli
from nlscale.cluster.life.rendezvous import meet
from nlscale.errors import SaidElsewhere, UserError

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=4, held_out=0.2)


def come(
    changes: dict[int, dict[str, str]], told: dict[int, dict[str, Any]]
) -> tuple[str, str, int]:
    """Meet as a rank with that environment, told that; how it ends: kind, words, exit code."""
    rank = int(os.environ["RANK"])
    environment = changes.get(rank, {})
    nlscale.__version__ = environment.pop("version", nlscale.__version__)
    os.environ.update(environment)
    try:
        meeting = meet(5, told.get(rank, {"train": {"steps": 4}}))
        meeting.store.set(f"done/{rank}", "")
        if rank == 0:  # the store is here
            meeting.store.wait([f"done/{other}" for other in range(len(meeting.hosts))])
        return "met", " ".join(meeting.hosts), 0
    except UserError as error:
        assert error.told or isinstance(error, SaidElsewhere)
        kind = "silent" if isinstance(error, SaidElsewhere) else "says"
        return kind, str(error), error.exit_code


def speaker(ended: list[tuple[str, str, int]]) -> str:
    """What the only rank says that does not follow another, where all end for one reason."""
    assert {code for _, _, code in ended} == {2}, ended
    (said,) = [words for kind, words, _ in ended if kind == "says"]
    return said


def test_ranks_that_were_told_the_same_meet() -> None:
    ended = world.run(3, come, {}, {})
    assert ended == [("met", f"{HOST} {HOST} {HOST}", 0)] * 3


def test_another_override_on_one_node_is_named_with_both_values() -> None:
    said = speaker(world.run(4, come, {}, {2: {"train": {"steps": 6}, "new": "x"}}))
    assert f"rank 2 on {HOST} was told something else than rank 0" in said
    assert f"train.steps 6 (rank 0 on {HOST}: 4)" in said and "new x" in said


def test_several_that_differ_are_counted() -> None:
    other = {"train": {"steps": 6}}
    said = speaker(world.run(4, come, {}, {2: other, 3: other}))
    assert "rank 2 on" in said and "(so were rank 3)" in said


def test_another_version_on_one_node() -> None:
    said = speaker(world.run(2, come, {1: {"version": "9.9"}}, {}))
    assert f"nlscale 9.9 (rank 0 on {HOST}: {nlscale.__version__})" in said


def test_another_number_of_ranks_on_one_node_ends_all() -> None:
    changes = {1: {"WORLD_SIZE": "3"}}
    said = speaker(world.run(2, come, changes, {}, ranks_per_node=1))
    assert "WORLD_SIZE" in said and f"rank 1 on {HOST} was told" in said


def test_two_processes_of_one_rank() -> None:
    twice = {2: {"RANK": "1", "LOCAL_RANK": "1"}}
    ended = world.run(3, come, twice, {})
    kinds = sorted(kind for kind, _, _ in ended)
    assert kinds == ["says", "silent", "silent"], ended
    assert "another process was told the same RANK=1" in speaker(ended)


def run_train(argv: list[str], changes: dict[int, list[str]]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cli.main([*argv, *changes.get(int(os.environ["RANK"]), [])])
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code, said.getvalue()
    raise AssertionError("it must exit")


def test_a_run_with_another_override_on_one_node_is_one_line_and_writes_nothing(
    data: Path, tmp_path: Path
) -> None:
    argv = train(data, tmp_path)
    ended = world.run(2, run_train, argv, {1: ["optimizer.learning_rate=0.5"]})
    assert [code for code, _ in ended] == [2, 2]
    (line,) = [said for _, said in ended if said]
    assert "optimizer.learning_rate 0.5 (rank 0" in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_data_at_another_place_is_the_same_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").symlink_to(data)
    argv = train(data, tmp_path, "train.steps=1", "levels=[1]")
    ended = world.run(2, run_train, argv, {1: [f"data.dir={tmp_path / 'copy'}"]})
    assert [code for code, _ in ended] == [0, 0], ended
