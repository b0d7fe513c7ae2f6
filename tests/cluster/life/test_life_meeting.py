"""Ranks that were told different things do not train together."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import world
from cluster.life.test_life_watch import train
from train.test_train_run import small_data

import nlscale
from nlscale import cli
from nlscale.cluster.life.place import Place
from nlscale.cluster.life.rendezvous import meet, meet_from
from nlscale.errors import LostRank, SaidElsewhere, UserError

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


def meet_in_threads(ranks: list[int], world_size: int, seconds: float, before: int) -> list[Any]:
    """Meet in a store as torchrun has it, in which some have arrived before: hosts, or errors."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    server.add("restart0/meeting0/arrived", before)

    def come_as(rank: int) -> Any:
        here = Place(
            rank, world_size, address="127.0.0.1", port=server.port, torchrun_has_store=True
        )
        try:
            return meet_from(here, 0, seconds, {}).hosts
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(come_as, ranks))


def test_a_count_from_a_start_before_misleads_nobody() -> None:
    assert meet_in_threads([0, 1, 2], 3, 20, before=2) == [(HOST,) * 3] * 3


def test_where_torchrun_has_the_store_one_rank_says_that_the_first_did_not_come() -> None:
    ended = meet_in_threads([1, 2, 3], 5, 1, before=0)
    (lost,) = [error for error in ended if isinstance(error, LostRank)]
    assert (
        f"2 of 5 ranks did not come within 1 s: ranks 0, 4; those that came are on {HOST}"
        in str(lost)
    )
    others = [error for error in ended if isinstance(error, SaidElsewhere)]
    assert [error.exit_code for error in others] == [LostRank.exit_code] * 2


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
