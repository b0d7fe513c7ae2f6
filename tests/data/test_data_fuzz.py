"""Random input: no document is changed, and none is lost without being counted."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from data.corpora import PACK, everything, small
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.data.documents import UnreadableError, read_documents
from nlscale.data.sources import find_files
from nlscale.errors import UserError

texts = st.text(max_size=8)
values = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(texts)
records = st.fixed_dictionaries({"text": texts}, optional={"id": values, "more": values})
junk = st.binary(max_size=12).map(lambda data: data.replace(b"\n", b""))
surrogates = st.text(st.characters(categories=["Cs", "L"]), max_size=3)


def read(path: Path) -> tuple[list[str], int, str]:
    """The texts in a file, how many documents of it are lost, and why the file is."""
    (file,) = find_files([str(path)]).files
    found: list[str] = []
    lost = 0
    try:
        for document in read_documents(file):
            assert document.error or document.data == document.text.encode()
            lost += bool(document.error)
            found += [] if document.error else [document.text]
    except UnreadableError as error:
        return found, lost, str(error)
    return found, lost, ""


def written(folder: str, name: str, data: bytes) -> Path:
    path = Path(folder) / name
    path.write_bytes(data)
    return path


@examples(150)
@given(
    rows=st.lists(records | junk | st.dictionaries(texts, values) | values, max_size=12),
    ascii_only=st.booleans(),
    end=st.sampled_from([b"", b"\n", b"\r\n\n"]),
    suffix=st.sampled_from([".jsonl", ".ndjson"]),
    packed=st.sampled_from(list(PACK)),
)
def test_lines(rows: list[Any], ascii_only: bool, end: bytes, suffix: str, packed: str) -> None:
    """Each line that is not blank is a document as it was written, or counted as lost."""
    lines = [
        row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=ascii_only).encode()
        for row in rows
    ]
    expected = []
    for line in lines:
        try:
            row = json.loads(line)
            expected += [row["text"]] if isinstance(row["text"], str) else []
        except (ValueError, TypeError, KeyError, IndexError):
            continue
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, f"a{suffix}{packed}", PACK[packed](b"\n".join(lines) + end))
        found, lost, reason = read(path)
    assert not reason
    assert found == expected
    assert lost == sum(bool(line.strip()) for line in lines) - len(expected)


@examples(100)
@given(rows=st.lists(records, max_size=8), style=st.sampled_from(["list", "lines", "spread"]))
def test_json(rows: list[dict[str, Any]], style: str) -> None:
    """A list, lines, or one record: told apart by what is in the file."""
    content = {
        "list": json.dumps(rows),
        "lines": "\n".join(json.dumps(row) for row in rows),
        "spread": json.dumps(rows[0] if rows else [], indent=2),
    }[style]
    with tempfile.TemporaryDirectory() as folder:
        found = read(written(folder, "a.json", content.encode()))
    wanted = rows[:1] if style == "spread" else rows
    assert found == ([row["text"] for row in wanted], 0, "")


@examples(150)
@given(
    data=st.binary(max_size=60),
    suffix=st.sampled_from([".jsonl", ".json", ".txt", ".parquet", ".csv", ".tar", ".npy"]),
)
def test_any_bytes(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found, lost, reason = read(written(folder, f"a{suffix}", data))
    blank = not data.strip()
    assert blank or found or lost or reason


@examples(200)
@given(
    rows=st.lists(texts, min_size=1, max_size=6),
    packed=st.sampled_from([packed for packed in PACK if packed]),
    at=st.integers(0, 10**6),
    change=st.one_of(st.none(), st.binary(min_size=1, max_size=3)),
)
def test_damaged_compressed_files(
    rows: list[str], packed: str, at: int, change: bytes | None
) -> None:
    """Cut off, or with other bytes in it: an error, or the same texts; never fewer, or others."""
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in rows)
    whole = PACK[packed](lines)
    at %= len(whole)
    data = whole[:at] if change is None else whole[:at] + change + whole[at + len(change) :]
    with tempfile.TemporaryDirectory() as folder:
        found, _, reason = read(written(folder, f"a.jsonl{packed}", data))
    # a frame of Zstandard has a checksum only where its writer asked for one; pyarrow does not
    if change is None or packed != ".zst":
        assert reason or found == rows or not data


@examples(40)
@given(
    rows=st.lists(texts, min_size=2, max_size=10, unique=True),
    bad=st.lists(junk | surrogates, max_size=3),
    packed=st.sampled_from(list(PACK)),
)
def test_builds(rows: list[str], bad: list[Any], packed: str) -> None:
    """What was written is in the shards, and everything else in the counts."""
    lines = [json.dumps({"text": text}).encode() for text in rows]
    lines += [row if isinstance(row, bytes) else json.dumps({"text": row}).encode() for row in bad]
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, f"a.jsonl{packed}", PACK[packed](b"\n".join(lines)))
        try:
            index = small([str(path)], Path(folder) / "out", max_lost=1.0)
        except UserError as error:
            assert "\n" not in str(error)
            assert not (Path(folder) / "out").exists()
            return
        kept = everything(Path(folder) / "out")
        readable, lost, _ = read(path)
    assert kept == sorted(text for text in readable if text)
    assert set(rows) <= {*readable}
    assert index["empty_documents"] == readable.count("")
    assert index["skipped"]["count"] == lost
