"""Files of tokens that break off, or whose index says what cannot be: named, and nothing read."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.corpora import left_out
from data.formats.sources import read, tokenizer, write_datatrove, write_megatron

from nlscale.data.build import build
from nlscale.data.documents import UnreadableError
from nlscale.data.sources import find_files
from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError

IDS = [[1, 2, 3], [4], [], [5, 6]]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer()


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def at(offset: int, form: str, value: int) -> Callable[[bytes], bytes]:
    data = struct.pack(form, value)
    return lambda old: old[:offset] + data + old[offset + len(data) :]


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (".bin", lambda data: data[:-1]),
        (".bin", lambda data: data + b"\0\0"),
        (".idx", lambda data: data[:-1]),
        (".idx", lambda data: data[:20]),
        (".idx", lambda data: data + b"\0" * 4),  # with modes, of several kinds of data
        (".idx", at(9, "<Q", 2)),
        (".idx", at(17, "<B", 6)),
        (".idx", at(17, "<B", 77)),
        (".idx", at(18, "<Q", 1 << 63)),
        (".idx", at(26, "<Q", 0)),
        (".idx", at(34, "<i", -1)),
        (".idx", at(34, "<i", 1 << 30)),
        (".idx", at(34 + 16 + 8, "<q", 0)),
        (".idx", at(34 + 16 + 32, "<q", 1)),
        (".idx", at(34 + 16 + 32 + 8, "<q", -1)),
        (".idx", at(34 + 16 + 32 + 16, "<q", 1 << 40)),
        (".idx", at(34 + 16 + 32 + 32, "<q", 3)),
    ],
)
def test_megatron(
    tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], bpe: Tokenizer
) -> None:
    path = write_megatron(tmp_path / "a.bin", IDS)
    assert [d.tokens.ids.tolist() for d in read(path, by=bpe) if d.tokens] == IDS
    changed(path.with_suffix(suffix), change)
    with pytest.raises(UnreadableError, match=r"damaged|version|type") as caught:
        read(path, by=bpe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("", lambda data: data[:-1]),
        ("", lambda data: data[:-2]),
        ("", lambda data: b""),
        (".index", lambda data: b""),
        (".index", lambda data: data[:-1]),
        (".index", lambda data: data[:-8]),
        (".index", at(0, "<Q", 5)),
        (".index", at(24, "<Q", 1 << 63)),
        (".loss", lambda data: data[:-1]),
        (".metadata", lambda data: data.replace(b"|2", b"|4")),
        (".metadata", lambda data: data.replace(b"|2", b"|x")),
    ],
)
def test_datatrove(
    tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], bpe: Tokenizer
) -> None:
    path = write_datatrove(tmp_path / "a.ds", IDS, [[1] * len(ids) for ids in IDS])
    assert [d.tokens.ids.tolist() for d in read(path, by=bpe) if d.tokens] == IDS
    changed(Path(f"{path}{suffix}"), change)
    with pytest.raises(UnreadableError, match="damaged"):
        read(path, by=bpe)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npy(np.arange(5, dtype="<u2"))[:-1],
        npy(np.arange(5, dtype="<u2")) + b"x",
        npy(np.arange(5, dtype="<u2"))[:50],
        npy(np.arange(5, dtype="<u2")).replace(b"(5,)", b"(9**9,)"),
        npy(np.arange(5, dtype="<u2")).replace(b"(5,)", b"(-5,)"),
        b"text",
        b"",
    ],
)
def test_numpy(tmp_path: Path, data: bytes, bpe: Tokenizer) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(UnreadableError, match="damaged"):
        read(tmp_path / "a.npy", by=bpe)


def test_other_arrays_and_indexes_are_left_out(tmp_path: Path, bpe: Tokenizer) -> None:
    """Not unpickled either."""
    bpe.save(tmp_path)
    source = tmp_path / "in"
    source.mkdir()
    arrays = {"a": np.zeros((2, 3), int), "b": np.zeros(3), "c": np.array([{}], dtype=object)}
    for name, array in arrays.items():
        np.save(source / f"{name}.npy", array)
    (source / "pack.idx").write_bytes(b"\xfftOc")
    (source / "pack.bin").write_bytes(b"x")
    (source / "model.bin").write_bytes(b"x" * 10)
    write_datatrove(source / "t.ds", [[n] * 3000 for n in range(200)], width=4)
    index = build([str(source)], str(tmp_path), tmp_path / "out", held_out=0.3)
    assert left_out(index) == {".npy without tokens": 3, ".bin without tokens": 1, ".bin": 1}


def test_an_index_that_is_missing(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "a.bin", IDS)
    path.with_suffix(".idx").rename(tmp_path / "b.idx")
    with pytest.raises(UserError, match=r"a\.bin: .*the index .*\.idx"):
        find_files([str(path)])


def test_a_changed_index_is_another_source(tmp_path: Path) -> None:
    path = write_datatrove(tmp_path / "a.ds", IDS)
    (before,) = find_files([str(tmp_path)]).files
    Path(f"{path}.loss").write_bytes(b"\1" * 6)
    (after,) = find_files([str(tmp_path)]).files
    assert before.path == after.path == path and after.size == before.size + 6


def test_a_document_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: Tokenizer
) -> None:
    monkeypatch.setattr("nlscale.data.formats.base.LARGEST", 16)
    ids = [[1, 2], [3] * 20, [4]]
    found = [*read(write_megatron(tmp_path / "a.bin", ids), by=bpe)]
    found += read(write_datatrove(tmp_path / "a.ds", ids, ids), by=bpe)
    array = np.array([i for one in ids for i in [*one, bpe.separator]], "<u2")
    np.save(tmp_path / "a.npy", array)
    found += read(tmp_path / "a.npy", by=bpe)
    assert [document.kind for document in found] == ["", "too large", ""] * 3
