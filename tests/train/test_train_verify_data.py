"""Shards that nobody has seen whole are hashed by all ranks together, once they have met."""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import world
from train.test_train_run import SMALL, run

from nlscale.cluster.life import watch
from nlscale.config import recipe
from nlscale.config.vocabulary import TimeoutsConfig
from nlscale.data import progress, verified
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.parallel.layout import process_groups
from nlscale.train import verify_data as together
from nlscale.train.prepare import prepare
from nlscale.train.verify_data import deal, spread_over_hosts, verify_data

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some shards of a few kilobytes, which their build remembers as whole."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(draw.choices("abcdef ", k=2000)))
    out = folder / "shards"
    build([str(folder)], "bytes", out, held_out=0.1, shard_tokens=8192, block_tokens=4096)
    return out


def copied(built: Path, folder: Path) -> Path:
    """A copy that nobody has checked."""
    shutil.copytree(built, folder, ignore=shutil.ignore_patterns(".verified.json"))
    return folder


def sizes(data: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in data.glob("*.tar")}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


def counted() -> Counter[str]:
    """Bytes that this rank will have hashed, by path."""
    read, seen = verified._read_into, Counter[str]()

    def count(file: Any, buffer: memoryview) -> int:
        size = read(file, buffer)
        seen[file.name] += size
        return size

    verified._read_into = count
    return seen


def said() -> io.StringIO:
    """What this rank will have said."""
    sys.stderr = io.StringIO()
    return sys.stderr


def meet(
    folders: list[str], limit: float | None = None, touched: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Meet the others and verify: the bytes that this rank hashed, what it said, how it ended.

    Args:
        folders: the data, of each node.
        limit: timeouts of that many seconds, once the ranks have met.
        touched: files of which the modification time is set anew, and then it is verified again;
            "" for none.
    """
    seen = counted()
    node = int(os.environ["RANK"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    config = recipe.load(None, [*SMALL, f"data.dir={folders[node]}", "run.dir=none"]).config
    results: list[dict[str, Any]] = []
    try:
        with process_groups(config) as layout:
            if limit is not None:
                config.timeouts = watch._now.timeouts = TimeoutsConfig(startup=limit, step=limit)
            for name in ("", *touched):
                if name and layout.is_writer:
                    os.utime(Path(folders[node]) / name)
                dist.barrier(layout.host)
                seen.clear()
                text, started = said(), time.monotonic()
                verify_data(config, prepare(config), layout)
                seconds = time.monotonic() - started
                results.append({"read": dict(seen), "said": text.getvalue(), "seconds": seconds})
    except UserError as error:
        results.append({"read": dict(seen), "error": str(error), "code": error.exit_code})
    return results


def train_counted(overrides: list[str]) -> tuple[Counter[str], str, dict[str, Any]]:
    seen, text = counted(), said()
    summary = run(overrides)
    return seen, text.getvalue(), summary


def test_after_a_build_a_run_hashes_nothing_and_says_nothing_of_it(
    built: Path, tmp_path: Path
) -> None:
    here = [f"data.dir={built}", f"run.dir={tmp_path}", "train.steps=1"]
    for seen, text, summary in world.run(2, train_counted, here):
        assert not seen and not text and summary["steps"] == 1


def test_ranks_that_see_the_same_files_share_them_and_remember(built: Path, tmp_path: Path) -> None:
    data = copied(built, tmp_path / "data")
    touched = ("", "train-000001.tar")
    ended = world.run(2, meet, [str(data)], None, touched)
    begin, again, altered = zip(*ended, strict=True)
    first, second = (rank["read"] for rank in begin)
    assert not first.keys() & second.keys() and {**first, **second} == sizes(data)
    largest = max(sizes(data).values())
    assert abs(sum(first.values()) - sum(second.values())) <= largest
    whole = sum(sizes(data).values()) / 1e3
    said = f"hashing {len(sizes(data))} shards ({whole:.3g} kB) that were never checked, on 2 ranks"
    assert [rank["said"].splitlines() for rank in begin] == [[said], []]
    assert [(rank["read"], rank["said"]) for rank in again] == [({}, "")] * 2
    assert [list(rank["read"]) for rank in altered] == [[f"{data}/train-000001.tar"], []]


def test_each_node_hashes_its_own_copy(built: Path, tmp_path: Path) -> None:
    copies = [copied(built, tmp_path / name) for name in ("one", "two")]
    here = [str(copy) for copy in copies]
    begin, again = zip(*world.run(4, meet, here, None, ("",), ranks_per_node=2), strict=True)
    for copy, ranks in zip(copies, (begin[:2], begin[2:]), strict=True):
        assert {**ranks[0]["read"], **ranks[1]["read"]} == sizes(copy)
        assert all(rank["read"] for rank in ranks)
    assert f"hashing {2 * len(sizes(built))} shards" in begin[0]["said"]
    assert not any(rank["read"] or rank["said"] for rank in again)

    flip(copies[1] / "train-000002.tar")
    why = f"shard {copies[1]}/train-000002.tar was altered: its sha256 as rank 2 on {HOST} reads it"
    for (rank,) in world.run(4, meet, here, ranks_per_node=2):
        assert rank["code"] == 2 and rank["error"].startswith(why), rank


def meet_without_writing(folders: list[str]) -> list[dict[str, Any]]:
    def refuse(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    verified.write_json = refuse
    return meet(folders, None, ("",))


def test_a_folder_that_may_only_be_read_is_hashed_at_each_start_which_is_said(
    built: Path, tmp_path: Path
) -> None:
    data = copied(built, tmp_path / "data")
    for first, second in zip(*world.run(2, meet_without_writing, [str(data)]), strict=True):
        assert {**first["read"], **second["read"]} == sizes(data)
        warning = f"warning: {data}/.verified.json cannot be written on {HOST} (Read-only file sys"
        _, line = first["said"].splitlines()
        assert line.startswith(warning) and "hashed again at each start" in line
        assert second["said"] == ""


def meet_slowly(folders: list[str], limit: float) -> list[dict[str, Any]]:
    """On one thread a rank, on which every 4 KiB take a while."""
    verified._CHUNK, progress._LINE_SECONDS, together._threads = 4096, 0.5, lambda: 1
    read = verified._read_into

    def slow(file: Any, buffer: memoryview) -> int:
        time.sleep(0.2)
        return read(file, buffer)

    verified._read_into = slow
    return meet(folders, limit)


def test_hashing_may_take_longer_than_the_timeouts(built: Path, tmp_path: Path) -> None:
    data = copied(built, tmp_path / "data")
    (first,), (second,) = world.run(2, meet_slowly, [str(data)], 2.0)
    assert min(first["seconds"], second["seconds"]) > 2.0
    _, *lines = first["said"].splitlines()
    assert lines and all(line.startswith("hashing: 0.") for line in lines)
    assert all(" shards, " in line and " MiB/s, ETA " in line for line in lines)
    assert second["said"] == ""


def meet_and_hang(folders: list[str], limit: float) -> list[dict[str, Any]]:
    """The second rank's file system answers no more."""
    read = verified._read_into

    def hang(file: Any, buffer: memoryview) -> int:
        if os.environ["RANK"] == "1":
            threading.Event().wait()
        return read(file, buffer)

    verified._read_into = hang
    return meet(folders, limit)


def test_a_rank_that_reads_nothing_is_named(built: Path, tmp_path: Path) -> None:
    data = copied(built, tmp_path / "data")
    for (rank,) in world.run(2, meet_and_hang, [str(data)], 1.5):
        assert rank["code"] == 5
        assert f"rank 1 on {HOST}: no byte of {data}/" in rank["error"]
        assert ".tar for 1.5 s (timeouts.startup)" in rank["error"]
    remembered = verified._read(data / ".verified.json")
    assert 0 < len(remembered) < len(sizes(data)), "those that the other rank has hashed"


def test_an_altered_shard_ends_all_ranks_before_run_dir_is_touched(
    built: Path, tmp_path: Path
) -> None:
    data = copied(built, tmp_path / "data")
    flip(data / "validation-000000.tar")
    argv = ["train", "quickstart", *SMALL, f"data.dir={data}", f"run.dir={tmp_path / 'run'}"]
    ended = world.command(2, argv, tmp_path / "out")
    assert [rank.code for rank in ended] == [2, 2]
    lines = [line for rank in ended for line in rank.output.splitlines()]
    (reason,) = (line for line in lines if line.startswith("nlscale: "))
    assert f"shard {data}/validation-000000.tar was altered: its sha256 as rank " in reason
    assert f" on {HOST} reads it differs from the index" in reason
    assert not (tmp_path / "run").exists()


def test_shards_are_dealt_by_bytes() -> None:
    draw = random.Random(1)
    for _ in range(50):
        sizes = [draw.randrange(1, 1000) for _ in range(draw.randrange(1, 60))]
        numbers = sorted(draw.sample(range(len(sizes)), draw.randrange(1, len(sizes) + 1)))
        ranks = draw.sample(range(100), draw.randrange(1, 9))
        parts = deal(sizes, numbers, ranks)
        assert sorted(n for part in parts.values() for n in part) == numbers
        assert len(parts) == min(len(numbers), len(ranks)) and parts.keys() <= set(ranks)
        loads = [sum(sizes[n] for n in parts.get(rank, [])) for rank in ranks]
        assert max(loads) - min(loads) <= max(sizes[n] for n in numbers)
        assert all(part == sorted(part, key=lambda n: -sizes[n]) for part in parts.values())
    assert deal([5], [], [0, 1]) == {}


def test_few_shards_are_spread_over_the_hosts() -> None:
    hosts = ("a", "a", "b", "b", "c", "c")
    assert spread_over_hosts(range(6), hosts) == [0, 2, 4, 1, 3, 5]
    assert spread_over_hosts([2, 3], hosts) == [2, 3]
