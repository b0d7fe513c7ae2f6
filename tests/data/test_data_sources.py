"""Sources: what can be read is read, in every format; what is not is counted and named."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.corpora import PACK, everything, left_out, lines, small

from nlscale.data.documents import UnreadableError, format_of, read_documents
from nlscale.data.sources import find_files
from nlscale.errors import UserError

TEXTS = [f"document {i}: ä\u2028\r\n{'x' * i}" for i in range(12)]
SMALL = ["one", "two", "three"]


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda texts: json.dumps([{"text": t} for t in texts], indent=1).encode(),
    ".Json": lines,
}


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def texts_of(path: Path, field: str = "text") -> list[str]:
    (file,) = find_files([str(path)]).files
    return [document.text for document in read_documents(file, field)]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_and_compression(tmp_path: Path, suffix: str, packed: str) -> None:
    path = put(tmp_path / f"a{suffix}{packed.upper()}", PACK[packed](FORMATS[suffix](TEXTS)))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".RST", ".md", ".py"])
def test_one_document_a_file(tmp_path: Path, suffix: str, packed: str) -> None:
    path = put(tmp_path / f"a{suffix}{packed}", PACK[packed](TEXTS[5].encode()))
    assert texts_of(path) == [TEXTS[5]]


@pytest.mark.parametrize("packed", [p for p in PACK if p])
def test_streams_one_after_another_are_read_whole(tmp_path: Path, packed: str) -> None:
    """As `cat a.gz b.gz`, pigz, bgzip and pzstd make them; the cuts are in mid-line."""
    data = lines(TEXTS * 2000)
    cuts = [0, 1, 100, 70000, 70001, len(data)]
    parts = [PACK[packed](data[a:b]) for a, b in itertools.pairwise(cuts)]
    assert texts_of(put(tmp_path / f"a.jsonl{packed}", b"".join(parts))) == TEXTS * 2000


@pytest.mark.parametrize("packed", [p for p in PACK if p])
@pytest.mark.parametrize("damage", ["half", "last byte", "tail", "second stream", "text"])
def test_damaged_compressed_files_are_lost_files(tmp_path: Path, packed: str, damage: str) -> None:
    """The standard library's readers end silently before a damaged second stream of bz2 and xz."""
    whole = PACK[packed](lines(TEXTS * 50))
    data = {
        "half": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "tail": whole + b"and more",
        "second stream": whole + b"\x13" + whole[1:],
        "text": lines(TEXTS),
    }[damage]
    path = put(tmp_path / "in" / f"a.jsonl{packed}", data)
    put(tmp_path / "in" / "b.jsonl", lines(SMALL))
    with pytest.raises(UserError, match=rf"1 of 2 files cannot be read .*damaged 1.*{path}.*--max"):
        small([str(path.parent)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    index = small([str(path.parent)], tmp_path / "out", max_lost=0.5)
    assert (index["lost_files"]["count"], index["lost_files"]["of"]) == (1, 2)
    assert index["lost_files"]["first"][0]["file"] == str(path)
    assert set(SMALL) <= set(everything(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "one"}', ["one"]),
        (b'\n {\n"text":\n "one"}\n', ["one"]),
        (b'{"text": "one"}\n\n{"text": "two"}', ["one", "two"]),
        (b'[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        (b'  [\n{"text": "one"}]\n', ["one"]),
        (b'\xef\xbb\xbf[{"text": "one"}]', ["one"]),
        ('[{"text": "ä"}]'.encode("utf-16"), ["ä"]),
        (b"[]", []),
        (b" \n", []),
        (b'{"text": "one", "n": ' + b"1" * 9999 + b"}", ["one"]),
    ],
    ids=["line", "spread", "lines", "list", "spaced", "bom", "utf-16", "none", "blank", "long"],
)
def test_json_is_told_by_its_content(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert texts_of(put(tmp_path / "a.json", content)) == expected


@pytest.mark.parametrize("content", [b'[{"text": "one"},', b"{", b"nothing", b"[" * 100000])
def test_json_that_is_none_is_a_lost_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UnreadableError, match="damaged"):
        texts_of(put(tmp_path / "a.json", content))


def test_lines_of_json_lines_are_counted_one_by_one(tmp_path: Path) -> None:
    content = b'{"text": "one"\n{"text": "two"}\n{"text": 5}\n{"text": "\\ud800"}\n'
    (file,) = find_files([str(put(tmp_path / "a.json", content))]).files
    kinds = [document.kind for document in read_documents(file)]
    assert kinds == ["not JSON", "", "'text' not a string", "not UTF-8"]


def test_other_names_of_the_text(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", lines(SMALL, "content"))
    pq.write_table(pa.table({"content": ["four"], "id": [4]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(UserError, match=r"no 'text' \(there are content\).*--text-field"):
        small([str(tmp_path / "in")], tmp_path / "out")
    index = small([str(tmp_path / "in")], tmp_path / "out", text_field="content")
    assert everything(tmp_path / "out") == sorted([*SMALL, "four"])
    assert index["text_field"] == "content"


def test_what_is_no_data_in_a_folder_is_counted_by_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    put(folder / "a.jsonl", lines([f"{i}" * 100 for i in range(100)]))
    put(folder / "page.HTML", b"<html>")
    put(folder / "table.tsv.gz", b"abc")
    put(folder / "LICENSE", b"mine")
    put(folder / ".git" / "x.txt", b"hidden")
    put(folder / ".hidden.txt", b"hidden")
    put(folder / "image.png", b"\x89PNG" * 10000)
    put(folder / "settings.json", b'{"a": 1}')
    put(folder / "none.jsonl", b"\n\n")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(folder)
        bound.bind("s.txt")
        os.chdir(here)
    (folder / "gone.bin").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    index = small([str(folder)], tmp_path / "out")
    expected = {".html": 1, ".tsv.gz": 1, "no suffix": 1, "hidden": 2, ".png": 1, "empty": 1}
    expected |= {".json without 'text'": 1, "pipe, socket or device": 2}
    expected |= {"link that leads nowhere": 1, "link to a folder that is read": 1}
    assert left_out(index) == expected
    assert index["skipped"] == {"count": 0, "first": [], "reasons": {}}
    assert index["lost_files"]["count"] == 0


def test_half_of_the_bytes_in_another_suffix_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", lines(["x" * 1000, "y" * 1000]))
    put(tmp_path / "in" / "b.tsv", b"text\n" + b"x" * 2000)
    says = r"not read \(49\S*%\): \.tsv 1 \(2,005 bytes\), such as \S+b\.tsv; .*--max-lost 0\.5"
    with pytest.raises(UserError, match=says):
        small([str(tmp_path / "in")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert left_out(small([str(tmp_path / "in")], tmp_path / "out", max_lost=0.5)) == {".tsv": 1}
    # it is looked at again where the data are up to date
    put(tmp_path / "in" / "c.tsv", b"x" * 9000)
    with pytest.raises(UserError, match=r"\.tsv 2"):
        small([str(tmp_path / "in")], tmp_path / "out", max_lost=0.5)


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "in" / "own" / "a.txt", b"one")
    put(tmp_path / "elsewhere" / "deep" / "b.txt", b"two")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "also").symlink_to("own")
    (tmp_path / "in" / "c.txt").symlink_to("own/a.txt")
    index = small([str(tmp_path / "in"), str(tmp_path / "in" / "own")], tmp_path / "out")
    assert everything(tmp_path / "out") == ["one", "two"]
    found = find_files([str(tmp_path / "elsewhere" / "deep"), str(tmp_path / "elsewhere")])
    assert [file.name for file in found.files] == ["b.txt", "up/back/c.txt"]
    assert left_out(index) == {"link to a folder that is read": 3}


def test_a_link_to_data_that_are_gone_is_a_lost_file(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.jsonl", lines(SMALL))
    (tmp_path / "in" / "b.jsonl.gz").symlink_to("annex/object")
    with pytest.raises(UserError, match=r"1 of 2 files .*link that leads nowhere 1.*b\.jsonl\.gz"):
        small([str(tmp_path / "in")], tmp_path / "out")


def test_a_pointer_of_git_lfs_is_no_document(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 12\n"
    for name in ("a.txt", "b.parquet", "c.jsonl.gz"):
        put(tmp_path / name, pointer)
        with pytest.raises(UnreadableError, match="git lfs pull"):
            texts_of(tmp_path / name)


def test_the_folder_that_is_built_is_no_source(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", lines(SMALL))
    index = small([str(tmp_path)], tmp_path / "out", max_lost=0.0)
    assert small([str(tmp_path)], tmp_path / "out", max_lost=0.0) == index
    put(tmp_path / "b.txt", b"more")
    index = small([str(tmp_path)], tmp_path / "out", max_lost=0.0, overwrite=True)
    assert left_out(index) == {"the folder that is built": 1}


@pytest.mark.parametrize(
    ("bad", "max_lost", "passes"),
    [(2, None, True), (3, None, False), (3, 0.015, True), (4, 0.015, False), (0, 0.0, True)],
)
def test_the_share_of_documents_that_may_be_lost(
    tmp_path: Path, bad: int, max_lost: float | None, passes: bool
) -> None:
    """Of each source: a large one does not hide that a small one is broken."""
    put(tmp_path / "large" / "a.jsonl", lines([f"{i}" for i in range(5000)]))
    content = lines([f"n{i}" for i in range(200 - bad)]) + b'{"id": 1}\n' * bad
    put(tmp_path / "small" / "a.jsonl", content)
    sources = [str(tmp_path / "large"), str(tmp_path / "small")]
    if passes:
        index = small(sources, tmp_path / "out", max_lost=max_lost)
        assert index["skipped"]["reasons"] == ({"no such field": bad} if bad else {})
        return
    with pytest.raises(UserError, match=rf"small: {bad} of 200 documents .*no such field {bad}"):
        small(sources, tmp_path / "out", max_lost=max_lost)
    assert not (tmp_path / "out").exists()


def test_files_named_by_a_pattern_are_one_source(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{i:03d}.txt", b"text %d" % i) for i in range(150)]
    paths.append(put(tmp_path / "bad.txt", b"\xff"))
    assert small([str(path) for path in paths], tmp_path / "out")["skipped"]["count"] == 1


def test_a_record_file_without_a_record_is_a_lost_file(tmp_path: Path) -> None:
    """However many it has: in a folder of a million documents it would be a share of nothing."""
    put(tmp_path / "in" / "a.jsonl", lines([f"{i}" for i in range(2000)]))
    put(tmp_path / "in" / "b.jsonl", lines(SMALL, "body"))
    with pytest.raises(UserError, match=r"1 of 2 files .*none of its 3 records .*there are body"):
        small([str(tmp_path / "in")], tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds nothing that can be read: it is empty"),
        (
            {"a.tsv": b"abc", ".b": b""},
            r"nothing that can be read: it has \.tsv 1 .*hidden 1",
        ),
        ({"a.json": b'{"body": 1}'}, r"holds no documents .*\.json without 'text' 1.*body.*-field"),
        ({"a.jsonl": b"", "b.jsonl": b"\n"}, "holds no documents that can be read: empty 2"),
    ],
    ids=["empty", "other", "field", "blank"],
)
def test_a_source_with_nothing_to_read(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        put(tmp_path / "in" / name, content)
    put(tmp_path / "more" / "a.jsonl", lines(SMALL))
    with pytest.raises(UserError, match=says) as caught:
        small([str(tmp_path / "more"), str(tmp_path / "in")], tmp_path / "out", max_lost=1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["", " ", "gone", "x" * 300, "pipe.txt", "a\nb"])
def test_sources_that_are_none(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.txt")
    Path("gone").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"no source at|it is a pipe") as caught:
        find_files([source])
    assert "\n" not in str(caught.value)


def test_names_that_would_break_a_line_are_escaped(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a\n\x1b[2J.jsonl", b'{"text": "one"}\n{"\x07": 1}\n')
    with pytest.raises(UserError) as caught:
        small([str(tmp_path / "in")], tmp_path / "out")
    assert str(caught.value).isprintable()


def test_suffixes() -> None:
    assert format_of("A.JSONL.Zst") == (".jsonl", ".zst")
    assert format_of("a.parquet") == (".parquet", "")
    for name in ("a.parquet.gz", "a.gz", "gz", "a", "a.tsv", "a.npy.gz", "a.txt.gz.gz", "a.txt."):
        assert format_of(name)[0] == "", name


def test_a_document_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlscale.data.formats.base.LARGEST", 1000)
    content = lines(["one", "x" * 5000, "two"]) + lines(["y" * 1000])[:-1]
    (file,) = find_files([str(put(tmp_path / "a.jsonl", content))]).files
    found = [(document.name[-1], document.kind) for document in read_documents(file)]
    assert found == [("1", ""), ("2", "too large"), ("3", ""), ("4", "too large")]
    for name in ("b.txt.gz", "c.json.gz"):
        with pytest.raises(UnreadableError, match="in one document"):
            texts_of(put(tmp_path / name, gzip.compress(b"x" * 1001)))
