"""Shards that lie on another service: read as local ones are, whatever the service does."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.corpora import small
from data.remote.servers import Server

from nlscale.config.vocabulary import CacheConfig
from nlscale.data import BatchReader, Samples, TokenShards, read_index
from nlscale.data.remote import service
from nlscale.data.remote.service import Patience, Service
from nlscale.data.tokenizer import SymbolTokenizer, load_tokenizer
from nlscale.errors import UserError

SHARD = "train-000002.tar"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("".join(chr(32 + i * j % 90) for j in range(120)))
    small([str(folder)], folder / "out")
    return folder / "out"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def server(built: Path) -> Iterator[Server]:
    with Server(built) as server:
        yield server


def cache(folder: Path, **keys: Any) -> CacheConfig:
    return CacheConfig(dir=str(folder), **{"size": "10 MB", "timeout": 2.0, "retries": 2, **keys})


def opened(server: Server, folder: Path, split: str = "train", **keys: Any) -> TokenShards:
    return TokenShards(server.url, split, cache=cache(folder, **keys))


def test_what_is_read_is_what_lies_there(built: Path, server: Server, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        here, there = TokenShards(built, split), opened(server, tmp_path / "cache", split)
        assert there.tokens == here.tokens and there.states == {}
        assert np.array_equal(there.read(0, there.tokens), here.read(0, here.tokens))
    names = [shard["name"] for split in here.index["splits"].values() for shard in split["shards"]]
    assert len(names) > 5 and all(server.asked[name] == 1 for name in names)
    again = pickle.loads(pickle.dumps(opened(server, tmp_path / "cache")))
    expected = here.read(100, 200)
    child = os.fork()
    if child == 0:  # which fetches it itself
        there = opened(server, tmp_path / "other", "validation")
        os._exit(0 if np.array_equal(there.read(100, 200), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(again.read(100, 700), TokenShards(built).read(100, 700))
    assert read_index(server.url) == read_index(built)
    assert load_tokenizer(server.url).name == "bytes"


def test_opening_asks_for_the_index_alone(server: Server, tmp_path: Path) -> None:
    opened(server, tmp_path).beside("validation")
    assert server.asked == {"index.json": 1}


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "short", "stall", "mute"])
def test_what_fails_once_is_asked_for_again(
    built: Path, server: Server, tmp_path: Path, fault: str
) -> None:
    server.faults[SHARD] = [fault]
    server.faults["index.json"] = [fault]
    there = opened(server, tmp_path, timeout=0.3)
    assert np.array_equal(there.read(0, there.tokens), TokenShards(built).read(0, there.tokens))
    assert server.asked[SHARD] == 2


@pytest.mark.parametrize(
    ("fault", "says", "times", "code"),
    [
        ("500", r"500.*; 3 attempts in [\d.]+ s \(data.cache.retries 2, ", 3, 5),
        ("cut", r"it broke off after [\d,]+ of [\d,]+ bytes: .*; 3 attempts", 3, 5),
        ("short", r"it ended after [\d,]+ of [\d,]+ bytes; 3 attempts", 3, 5),
        ("stall", r"it stalls: no byte for 0\.2 s after [\d,]+ bytes; 3 attempts", 3, 5),
        ("mute", r"it stalls: no byte for 0\.2 s after 0 bytes; 3 attempts", 3, 5),
        ("lie", r"was altered: its sha256 differs from the index, fetched twice; restore", 2, 2),
        ("more", r"was altered: it has more than the [\d,]+ bytes of the index, fetched tw", 2, 2),
        ("404", "it is not there", 1, 2),
        ("403", "the service refuses it: 403", 1, 2),
    ],
)
def test_what_fails_is_named_in_one_line(
    server: Server, tmp_path: Path, fault: str, says: str, times: int, code: int
) -> None:
    server.always[SHARD] = fault
    there = opened(server, tmp_path, timeout=0.2)
    with pytest.raises(UserError, match=says) as error:
        there.read(0, there.tokens)
    assert f"{server.url}/{SHARD}" in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == code
    assert server.asked[SHARD] == times
    sha256 = next(shard["sha256"] for shard in there.shards if shard["name"] == SHARD)
    kept = os.listdir(tmp_path)
    assert not any(name.startswith(sha256) for name in kept), "nothing of it is kept"
    assert len(kept) > 2


def test_a_lie_is_forgiven_once(built: Path, server: Server, tmp_path: Path) -> None:
    server.faults[SHARD] = ["lie"]
    there = opened(server, tmp_path)
    assert np.array_equal(there.read(0, there.tokens), TokenShards(built).read(0, there.tokens))


def test_a_slow_server_is_waited_for_within_bounds(
    built: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.always[SHARD] = "slow"
    there = opened(server, tmp_path / "one")
    assert np.array_equal(there.read(0, there.tokens), TokenShards(built).read(0, there.tokens))
    patience = Patience(timeout=10, retries=2)
    assert patience.of_attempt(1_000_000) == 10 + 10
    assert patience.most(1_000_000) == 3 * 20 + 0.01 + 0.02
    there = opened(server, tmp_path / "two", retries=0)
    monkeypatch.setattr(Patience, "of_attempt", lambda self, size: 0.0)
    with pytest.raises(
        UserError, match=r"it is too slow: [\d,]+ of [\d,]+ bytes in .*; 1 attempt "
    ):
        there.read(0, there.tokens)


def test_an_index_that_drips_is_given_up(server: Server) -> None:
    """Whose size nobody knows before: what has come must have come fast enough."""
    server.always["index.json"] = "drip"
    for read in (read_index, lambda url, patience: Service(url, patience).read("index.json")):
        with pytest.raises(
            UserError, match=r"index\.json: it is too slow: \d+ bytes in 0\.3 s; 2 attempts"
        ):
            read(server.url, Patience(0.3, 1))
    assert server.asked["index.json"] == 4


def test_an_index_without_an_end_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LARGEST_SMALL", 100)
    with pytest.raises(UserError, match=r"index\.json: it sends more than the 100 bytes it may"):
        read_index(server.url, Patience(2.0, 3))
    assert server.asked["index.json"] == 1, "asking again would change nothing"


@pytest.mark.parametrize("fault", ["short", "page"])
def test_what_is_no_json_is_asked_for_again(built: Path, server: Server, fault: str) -> None:
    """A transfer that was cut without a word, or the page of a login."""
    for name in ("index.json", "tokenizer.json"):
        server.faults[name] = [fault]
    assert read_index(server.url, Patience(2.0, 1)) == read_index(built)
    assert load_tokenizer(server.url).name == "bytes"
    server.always["index.json"] = fault
    says = (
        r"cannot read .*index\.json: it sends no JSON, but [\d,]+ bytes that begin with '(<html|{)"
    )
    with pytest.raises(UserError, match=f"{says}.*; 2 attempts .*; see to the service") as error:
        read_index(server.url, Patience(2.0, 1))
    assert "\n" not in str(error.value) and "overwrite" not in str(error.value)


def test_an_index_that_cannot_be_is_copied_again(built: Path, tmp_path: Path) -> None:
    index = json.loads((built / "index.json").read_text())
    for change, says in (({"format": 99}, "has format 99"), ({"separator": -1}, "cannot be used")):
        (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
        with Server(tmp_path) as server:
            for place, fix in ((server.url, "copy the folder there"), (tmp_path, "build it")):
                with pytest.raises(UserError, match=f"{says}.*{fix} again"):
                    read_index(place)


def test_a_tokenizer_that_is_not_that_of_the_index(built: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes((built / "index.json").read_bytes())
    SymbolTokenizer("other", ["a", "b"]).save(tmp_path)
    with (
        Server(tmp_path) as server,
        pytest.raises(UserError, match=r"tokenizer\.json has not made the data there: its sha256"),
    ):
        load_tokenizer(server.url)


def test_nobody_answers(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        url = server.url
    began = time.monotonic()
    with pytest.raises(UserError, match=f"cannot read {url}/index.json: .*; 2 attempts"):
        read_index(url, Patience(1.0, 1))
    assert time.monotonic() - began < 5


def test_no_data_there(tmp_path: Path) -> None:
    says = r"no data at .*: there is no index\.json; build it"
    with Server(tmp_path) as empty, pytest.raises(UserError, match=says):
        read_index(empty.url)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_services(built: Path, tmp_path: Path, protocol: str) -> None:
    import fsspec

    url = f"file://{tmp_path}/copy" if protocol == "file" else "memory://nlscale/data"
    files, root = fsspec.url_to_fs(url)
    files.makedirs(root, exist_ok=True)
    files.put([str(path) for path in built.iterdir()], root)
    there = TokenShards(url, cache=cache(tmp_path / "cache"))
    assert np.array_equal(there.read(0, there.tokens), TokenShards(built).read(0, there.tokens))
    files.pipe_file(f"{root}/{SHARD}", b"other")
    with pytest.raises(UserError, match=rf"{SHARD} was altered: it has 5 bytes, the index says"):
        TokenShards(url, cache=cache(tmp_path / "cache"))
    files.rm_file(f"{root}/{SHARD}")
    with pytest.raises(UserError, match=rf"{SHARD} is missing"):
        TokenShards(url, cache=cache(tmp_path / "cache"))
    assert TokenShards(url, verify=False, cache=cache(tmp_path / "cache")).read(0, 5).shape == (5,)


def test_what_is_expected_is_fetched_before_it_is_read(
    built: Path, server: Server, tmp_path: Path
) -> None:
    there = opened(server, tmp_path, threads=2)
    samples = Samples(there, 50)
    reader = BatchReader(samples, 3)
    reader.expect([(0, 4), (8, 4)])
    numbers = [*reader.order.take(0, 4), *reader.order.take(8, 4)]
    needed = {
        shard["name"]
        for number in numbers
        for position in (number * 50, number * 50 + 50)
        for shard in [there.shards[int(np.searchsorted(there._starts, position, "right")) - 1]]
    }
    there.folder._ahead.wait()  # type: ignore[attr-defined]
    assert {name for name in server.asked if name.endswith(".tar")} == needed
    server.asked.clear()
    here = BatchReader(Samples(TokenShards(built), 50), 3)
    assert np.array_equal(reader.read(0, 4), here.read(0, 4))
    assert np.array_equal(reader.read(8, 4), here.read(8, 4))
    assert not server.asked


def test_no_more_is_read_ahead_than_half_of_the_cache_holds(server: Server, tmp_path: Path) -> None:
    size = max(shard["size_bytes"] for shard in opened(server, tmp_path / "any").shards)
    there = opened(server, tmp_path / "cache", size=f"{4 * size} B", threads=1)
    there.expect([(0, there.tokens)])
    there.folder._ahead.wait()  # type: ignore[attr-defined]
    fetched = [name for name in server.asked if name.endswith(".tar")]
    assert fetched == [shard["name"] for shard in there.shards[:2]]


def test_a_size_that_is_none(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache\.size is '5 apples', which is no size"):
        opened(server, tmp_path, size="5 apples")
