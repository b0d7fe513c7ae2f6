"""The folder in which processes share shards of other services: its bound, and who may read."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from data.corpora import small
from data.remote.servers import Server

from nlscale.config.vocabulary import CacheConfig
from nlscale.data import TokenShards
from nlscale.data.index import Shard
from nlscale.data.remote import cache as cache_module
from nlscale.data.remote.cache import Cache
from nlscale.errors import UserError

SIZE = 1000
_CONTEXT = multiprocessing.get_context("fork")


def shard(number: int) -> Shard:
    data = content(number)
    return Shard(
        name=f"train-{number:06d}.tar", tokens=1, blocks=1, size_bytes=SIZE,
        sha256=hashlib.sha256(data).hexdigest(), offset=0, stride=0,
    )  # fmt: skip


def content(number: int) -> bytes:
    return number.to_bytes(4, "little") * (SIZE // 4)


class Source:
    """Gives shards, and notes how often."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.given = cache, list[int]()

    def read(self, number: int) -> bytes:
        def fetch(file: BinaryIO) -> None:
            self.given.append(number)
            file.write(content(number))

        with self.cache.opened(shard(number), fetch, 10.0) as descriptor:
            return os.pread(descriptor, SIZE, 0)


def taken(folder: Path) -> int:
    """Bytes of what is there and of what is set aside, counted without the code under test."""
    total = 0
    for name in os.listdir(folder):
        if name.endswith(".partial"):
            total += int(name.split(".")[1])
        elif len(name) == 64:
            total += SIZE
    return total


def test_the_least_recently_used_gives_way_and_is_fetched_again(tmp_path: Path) -> None:
    source = Source(Cache(tmp_path, 3 * SIZE))
    order: list[int] = []  # least recently used first, over a list
    expected, draw = [], random.Random(0)
    for _ in range(120):
        number = draw.randrange(5)
        assert source.read(number) == content(number)
        if number in order:
            order.remove(number)
        else:
            expected.append(number)
            order = order[-2:]
        order.append(number)
        assert taken(tmp_path) == SIZE * len(order) == source.cache.used()
    assert source.given == expected


def test_what_is_open_stays(tmp_path: Path) -> None:
    source = Source(Cache(tmp_path, 2 * SIZE))
    with source.cache.opened(shard(0), lambda file: file.write(content(0)) and None, 1.0) as held:
        for number in (1, 2, 3):
            source.read(number)
            assert source.cache.has(shard(0)) and taken(tmp_path) == 2 * SIZE
        assert os.pread(held, SIZE, 0) == content(0)
    source.read(4)
    source.read(5)
    assert not source.cache.has(shard(0))


def test_room_that_never_comes_is_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SIZE + 10)
    with cache.opened(shard(0), lambda file: file.write(content(0)) and None, 1.0):
        says = r"no room for a shard of 1 kB: 1 kB of 1\.01 kB have"
        with pytest.raises(UserError, match=says), cache.opened(shard(1), print, 0.1):
            pass
    assert Source(cache).read(1) == content(1)


def test_who_waits_for_room_gets_it(tmp_path: Path) -> None:
    cache, let_go = Cache(tmp_path, SIZE), threading.Event()
    begun = threading.Event()

    def hold() -> None:
        with cache.opened(shard(0), lambda file: file.write(content(0)) and None, 1.0):
            begun.set()
            let_go.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert begun.wait(10)
    threading.Timer(0.2, let_go.set).start()
    assert Source(cache).read(1) == content(1)
    holder.join()


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise UserError("the service is gone")

    with pytest.raises(UserError, match="is gone"), cache.opened(shard(0), fail, 1.0):
        pass
    assert taken(tmp_path) == 0
    assert Source(cache).read(0) == content(0)


def test_a_file_of_another_size_is_replaced(tmp_path: Path) -> None:
    source = Source(Cache(tmp_path, 3 * SIZE))
    source.read(0)
    os.truncate(tmp_path / shard(0)["sha256"], 10)
    assert source.read(0) == content(0) and source.given == [0, 0]


def test_a_shard_that_was_written_to_is_replaced(tmp_path: Path) -> None:
    """Of the same size: in a process that has read it, and in one that has not."""
    path = tmp_path / shard(0)["sha256"]
    source = Source(Cache(tmp_path, 3 * SIZE))
    source.read(0)
    for seconds, reader in enumerate((source, Source(Cache(tmp_path, 3 * SIZE)))):
        path.write_bytes(b"X" * SIZE)
        os.utime(path, (5 + seconds, 5 + seconds))
        assert reader.read(0) == content(0)
    assert source.given == [0, 0] and reader.given == [0]


def test_a_shard_is_hashed_once_where_it_is_not_known_to_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an earlier version are; and what gives way is forgotten."""
    hashed, hash_ = list[int](), cache_module._sha256

    def counted(descriptor: int, lock: int) -> str:
        hashed.append(descriptor)
        return hash_(descriptor, lock)

    monkeypatch.setattr(cache_module, "_sha256", counted)
    Source(Cache(tmp_path, 2 * SIZE)).read(0)
    assert not hashed, "it was compared when it was fetched"
    (note,) = (tmp_path / "whole").iterdir()
    note.unlink()
    for _ in range(2):
        source = Source(Cache(tmp_path, 2 * SIZE))
        assert [source.read(0) for _ in range(3)] == 3 * [content(0)] and not source.given
    assert len(hashed) == 1
    for number in (1, 2, 3):
        source.read(number)
    names = {shard(number)["sha256"] for number in (2, 3)}
    assert set(os.listdir(tmp_path / "whole")) == names


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    cache = Cache(tmp_path, 3 * SIZE)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; make room, or"):
        Source(cache).read(0)
    assert taken(tmp_path) == 0


def fetch_and_hang(folder: Path, begun: Any) -> None:
    def hang(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        begun.set()
        time.sleep(60)

    with Cache(folder, SIZE).opened(shard(0), hang, 1.0):
        pass


def test_what_a_killed_process_was_fetching_is_fetched_by_who_waits(tmp_path: Path) -> None:
    begun = _CONTEXT.Event()
    process = _CONTEXT.Process(target=fetch_and_hang, args=(tmp_path, begun))
    process.start()
    assert begun.wait(10) and taken(tmp_path) == SIZE
    found: list[bytes] = []
    waiting = threading.Thread(
        target=lambda: found.append(Source(Cache(tmp_path, SIZE)).read(0)), daemon=True
    )
    waiting.start()
    time.sleep(0.1)
    assert not found and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiting.join(10)
    assert found == [content(0)]
    assert sorted(os.listdir(tmp_path)) == sorted([shard(0)["sha256"], "lock", "locks", "whole"])
    assert not os.listdir(tmp_path / "locks")


def test_who_was_stopped_is_named(tmp_path: Path) -> None:
    begun = _CONTEXT.Event()
    process = _CONTEXT.Process(target=fetch_and_hang, args=(tmp_path, begun))
    process.start()
    assert begun.wait(10) and process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    says = rf"{shard(0)['sha256']} is held by process {process.pid} on .*nothing for 0 s; let it go"
    try:
        with pytest.raises(UserError, match=says):
            Source(Cache(tmp_path, SIZE, silence=0.2)).read(0)
    finally:
        process.kill()
        process.join()


def test_who_fetches_slowly_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, begun, files = Cache(tmp_path, SIZE), threading.Event(), list[BinaryIO]()
    over, waiting = threading.Event(), Source(Cache(tmp_path, SIZE, silence=0.02))

    def fetch(file: BinaryIO) -> None:
        files.append(file)
        begun.set()
        assert over.wait(10)

    def take() -> None:
        with slow.opened(shard(0), fetch, 1.0):
            pass

    looks, look = list[int](), waiting.cache._signs

    def bytes_came(path: Path, name: str | None) -> tuple[str, ...]:
        if path.name == shard(0)["sha256"] and len(looks) < 5:
            files[0].write(content(0)[200 * len(looks) : 200 * len(looks) + 200])
            files[0].flush()
            looks.append(1)
            if len(looks) == 5:
                monkeypatch.setattr(waiting.cache, "_silence", 60.0)
                over.set()
        return look(path, name)

    monkeypatch.setattr(waiting.cache, "_signs", bytes_came)
    holder = threading.Thread(target=take)
    holder.start()
    assert begun.wait(10)
    assert waiting.read(0) == content(0) and not waiting.given and len(looks) == 5
    holder.join()


def read_many(folder: Path, size: int, seed: int, results: Any) -> None:
    """Read at random from several threads, and see that the bound holds after each."""
    cache, wrong = Cache(folder, size), list[str]()

    def work(number: int) -> None:
        draw, source = random.Random(100 * seed + number), Source(cache)
        for _ in range(40):
            wanted = draw.randrange(8)
            if source.read(wanted) != content(wanted):
                wrong.append(f"{wanted} is another")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(wrong)


def test_the_bound_holds_while_many_read(tmp_path: Path) -> None:
    results = _CONTEXT.Queue()
    cache = Cache(tmp_path, 4 * SIZE + 10)
    processes = [
        _CONTEXT.Process(target=read_many, args=(tmp_path, cache.size, seed, results))
        for seed in range(2)
    ]
    for process in processes:
        process.start()
    most, looks = 0, 0
    while any(process.is_alive() for process in processes):
        # under the lock, as names that change while they are listed are counted twice
        with cache._locked(tmp_path / "lock"):
            most, looks = max(most, cache.used()), looks + 1
        time.sleep(0.001)
    assert [results.get(timeout=10) for _ in processes] == [[], []]
    assert 3 * SIZE <= most <= cache.size and looks > 10


def read_all(url: str, folder: Path, together: Any, results: Any) -> None:
    config = CacheConfig(dir=str(folder), size="1 MB", threads=2)
    shards = TokenShards(url, cache=config)
    together.wait()
    shards.expect([(0, shards.tokens)])
    results.put(int(shards.read(0, shards.tokens).sum()))


def test_processes_that_share_a_folder_fetch_each_shard_once(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} " * 60)
    small([str(tmp_path / "text")], tmp_path / "data")
    together, results = _CONTEXT.Barrier(2), _CONTEXT.Queue()
    server = Server(tmp_path / "data")
    server.begun = lambda name: time.sleep(0.01)  # so that both want it at the same time
    processes = [
        _CONTEXT.Process(target=read_all, args=(server.url, tmp_path / "c", together, results))
        for _ in range(2)
    ]
    for process in processes:  # before there are threads, which a fork does not carry over
        process.start()
    with server:
        sums = {results.get(timeout=30) for _ in processes}
        for process in processes:
            process.join()
        here = TokenShards(tmp_path / "data")
        asked = {name: count for name, count in server.asked.items() if name.endswith(".tar")}
    assert sums == {int(here.read(0, here.tokens).sum())}
    assert asked == {shard["name"]: 1 for shard in here.shards} and len(asked) > 5
