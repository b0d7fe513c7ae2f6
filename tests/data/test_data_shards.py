"""Reading: any range of tokens, from whole shards only; samples and batches on top."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlscale.data import BatchReader, Samples, TokenShards, local, read_index, verified
from nlscale.data.build import build
from nlscale.errors import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand train tokens in blocks of 64 and shards of 256."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text("".join(chr(32 + i * j % 90) for j in range(90)))
    build([str(folder)], "bytes", folder / "out", shard_tokens=256, block_tokens=64)
    return folder / "out"


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may harm, not verified yet."""
    return Path(
        shutil.copytree(built, tmp_path / "data", ignore=shutil.ignore_patterns(".verified.json"))
    )


def tokens_of(data: Path) -> np.ndarray:
    """All train tokens, taken from the tar files without the code under test."""
    parts = []
    for path in sorted(data.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                parts.append(np.frombuffer(file.read(), dtype=np.uint8))
    return np.concatenate(parts).astype(np.int64)


def flip(path: Path) -> None:
    """Alter one byte of a shard's tokens."""
    with open(path, "r+b") as file:
        file.seek(600)
        byte = file.read(1)[0]
        file.seek(600)
        file.write(bytes([byte ^ 1]))


def test_any_range_can_be_read(built: Path) -> None:
    whole = tokens_of(built)
    shards = TokenShards(built)
    assert shards.tokens == len(whole) > 3 * 256
    random = np.random.default_rng(0)
    ranges = [(0, 0), (0, 1), (0, len(whole)), (len(whole) - 1, 1), (len(whole), 0), (64, 64)]
    ranges += [(256, 256), (255, 2), (63, 2)]
    for start in random.integers(0, len(whole), 200):
        ranges.append((int(start), int(random.integers(0, len(whole) - start + 1))))
    for start, count in ranges:
        read = shards.read(start, count)
        assert read.dtype == np.int64
        assert np.array_equal(read, whole[start : start + count])
    for start, count in ((-1, 2), (0, len(whole) + 1), (len(whole), 1), (3, -1)):
        with pytest.raises(IndexError):
            shards.read(start, count)


def test_more_shards_than_open_files(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_OPEN_FILES", 2)
    shards = TokenShards(built)
    before = len(os.listdir("/proc/self/fd"))
    assert np.array_equal(shards.read(0, shards.tokens), tokens_of(built))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    shards.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert shards.read(5, 1).shape == (1,)


def test_forked_and_pickled_readers_read_the_same(built: Path) -> None:
    shards = TokenShards(built)
    expected = shards.read(100, 700)
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(shards.read(100, 700), expected) for _ in range(50))
        os._exit(0 if same else 1)
    for _ in range(50):
        assert np.array_equal(shards.read(100, 700), expected)
    assert os.waitpid(child, 0)[1] == 0
    copy = pickle.loads(pickle.dumps(shards))
    shards.close()
    assert np.array_equal(copy.read(100, 700), expected)


def test_missing_shard(data: Path) -> None:
    (data / "train-000002.tar").unlink()
    for verify in (True, False):
        with pytest.raises(UserError, match=r"train-000002\.tar is missing"):
            TokenShards(data, verify=verify)
    TokenShards(data, "validation")


def test_truncated_shard(data: Path) -> None:
    os.truncate(data / "train-000001.tar", 700)
    for verify in (True, False):
        with pytest.raises(UserError, match=r"train-000001\.tar was altered.*700"):
            TokenShards(data, verify=verify)


def test_flipped_byte(data: Path) -> None:
    TokenShards(data)  # remembered as whole
    flip(data / "train-000003.tar")
    with pytest.raises(UserError, match=r"train-000003\.tar was altered.*sha256"):
        TokenShards(data)
    TokenShards(data, verify=False)


def test_shard_truncated_while_reading(data: Path) -> None:
    shards = TokenShards(data)
    shards.read(0, 10)
    os.truncate(data / "train-000000.tar", 600)
    with pytest.raises(UserError, match=r"train-000000\.tar.*shorter"):
        shards.read(0, 256)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that were read to be hashed, by name of the shard."""
    read, seen = verified._read_into, Counter[str]()

    def count(file: Any, buffer: memoryview) -> int:
        size = read(file, buffer)
        seen[Path(file.name).name] += size
        return size

    monkeypatch.setattr(verified, "_read_into", count)
    return seen


def test_shards_are_hashed_once(data: Path, hashed: Counter[str]) -> None:
    TokenShards(data)
    sizes = {path.name: path.stat().st_size for path in data.glob("train-*.tar")}
    assert hashed == sizes and len(sizes) > 2
    hashed.clear()
    TokenShards(data)
    assert not hashed
    os.utime(data / "train-000000.tar")
    TokenShards(data)
    assert list(hashed) == ["train-000000.tar"]
    (data / ".verified.json").write_text("torn")
    hashed.clear()
    TokenShards(data)
    assert hashed == sizes


def test_a_build_remembers_what_it_wrote(built: Path, tmp_path: Path, hashed: Counter[str]) -> None:
    data = Path(shutil.copytree(built, tmp_path / "data"))  # which keeps modification times
    for split in ("train", "validation"):
        TokenShards(data, split)
    assert not hashed
    path = data / "train-000001.tar"
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    TokenShards(data)  # a known limit: it looks the same
    os.utime(path)
    with pytest.raises(UserError, match=r"train-000001\.tar was altered.*sha256"):
        TokenShards(data)
    assert set(hashed) == {"train-000001.tar"}


def test_a_build_over_another_forgets_what_that_one_wrote(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(9):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{number} " * 300)
    out = tmp_path / "out"
    build([str(tmp_path / "in")], "bytes", out, shard_tokens=128, block_tokens=64)
    many = json.loads((out / ".verified.json").read_text())
    build([str(tmp_path / "in")], "bytes", out, overwrite=True)
    few = json.loads((out / ".verified.json").read_text())
    assert len(many) > 3 and set(few) == {path.name for path in out.glob("*.tar")}


def test_a_folder_that_cannot_be_written_is_only_read(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(verified, "write_json", refuse)
    assert TokenShards(data).read(0, 3).shape == (3,)


def test_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data at .*nlscale data build --source PATH"):
        read_index(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no data at"):
        TokenShards(tmp_path / "file")


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}'])
def test_an_index_that_cannot_be_used(data: Path, content: str) -> None:
    (data / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json.*--overwrite"):
        TokenShards(data)


def test_unknown_split(built: Path) -> None:
    with pytest.raises(UserError, match="train, validation"):
        TokenShards(built, "test")


def test_samples_tile_the_tokens(built: Path) -> None:
    whole = tokens_of(built)
    samples = Samples(TokenShards(built), 100)
    assert len(samples) == (len(whole) - 1) // 100
    for i, sample in enumerate(samples):
        assert np.array_equal(sample, whole[i * 100 : i * 100 + 101])
    with pytest.raises(IndexError):
        samples[len(samples)]
    exact = Samples(TokenShards(built), len(whole) - 1)
    assert len(exact) == 1 and np.array_equal(exact[0], whole)


def test_too_little_data(built: Path) -> None:
    shards = TokenShards(built)
    with pytest.raises(UserError, match=f"{shards.tokens:,} tokens.*needs {shards.tokens + 1:,}"):
        Samples(shards, shards.tokens)
    with pytest.raises(UserError, match="sequence length"):
        Samples(shards, 0)


def test_batches_cover_each_epoch_once_however_they_are_cut(built: Path) -> None:
    samples = Samples(TokenShards(built), 50)
    reader = BatchReader(samples, seed=9)
    epoch = reader.read(0, len(samples))
    assert epoch.shape == (len(samples), 51) and epoch.dtype == np.int64
    in_order = np.stack(list(samples))
    assert not np.array_equal(epoch, in_order)
    assert sorted(map(tuple, epoch)) == sorted(map(tuple, in_order))
    second = BatchReader(samples, seed=9).read(len(samples) - 3, 10)
    assert np.array_equal(second[:3], epoch[-3:])
    assert np.array_equal(second[4:6], reader.read(len(samples) + 1, 2))
    assert reader.read(7, 0).shape == (0, 51)
