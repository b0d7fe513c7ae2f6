"""Random tables, tar files, tokens and templates: what was written, or why not; nothing else."""

from __future__ import annotations

import csv
import io
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from data.corpora import PACK
from data.formats.sources import read, tar_of, tokenizer, write_datatrove, write_megatron
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.data.documents import Document, UnreadableError, read_documents
from nlscale.data.formats.records import record, template_of
from nlscale.data.sources import find_files
from nlscale.errors import UserError

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
ids = st.lists(st.integers(0, 259), max_size=6)
BY = tokenizer()


def put(folder: str, name: str, data: bytes) -> Path:
    path = Path(folder) / name
    path.write_bytes(data)
    return path


def started(path: Path) -> tuple[list[Document], str]:
    """What a file gives, and why not more of it."""
    (file,) = find_files([str(path)]).files
    found: list[Document] = []
    try:
        found.extend(read_documents(file, tokenizer=BY))
    except UnreadableError as error:
        assert "\n" not in str(error)
        return found, str(error)
    return found, ""


@examples(50)
@given(
    rows=st.lists(st.tuples(texts, texts), max_size=6),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    end=st.sampled_from(["\n", "\r\n"]),
    packed=st.sampled_from(list(PACK)),
)
def test_tables(rows: list[tuple[str, str]], quoting: int, end: str, packed: str) -> None:
    file = io.StringIO(newline="")
    if any("\r" in text for row in rows for text in row):  # older versions leave it unquoted
        quoting = csv.QUOTE_ALL
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerows([("a", "text"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, f"a.csv{packed}", PACK[packed](file.getvalue().encode()))
        assert [document.text for document in read(path)] == [text for _, text in rows]


names = st.text("ab./-ü ", min_size=1, max_size=7).map(lambda name: name.strip("/ ") or "a")
members = st.tuples(names, st.sampled_from([".txt", ".json", ".jpg", ""]), texts)


@examples(60)
@given(
    made=st.lists(members, max_size=6, unique_by=lambda member: member[0] + member[1]),
    packed=st.sampled_from(["", ".gz"]),
    cut=st.none() | st.integers(0, 10**6),
)
def test_tar_files(made: list[tuple[str, str, str]], packed: str, cut: int | None) -> None:
    """Each member is a document, lost, or left out; of one that breaks off, those before."""
    data = tar_of([(name + suffix, text.encode()) for name, suffix, text in made])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = max((m.offset_data + m.size + -m.size % 512 for m in tar.getmembers()), default=0)
    cut = None if cut is None else cut % (end + 512)  # behind it, it changes nothing
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, f"a.tar{packed}", PACK[packed](data[:cut]))
        found, why = started(path)
        assert [entry.name for entry in Path(folder).iterdir()] == [path.name]
    whole = [f"{path}:{name}{suffix}" for name, suffix, _ in made]
    shown = [document.name for document in found]
    assert bool(why) == (cut is not None)
    assert not set(shown) - set(whole) and len(set(shown)) == len(shown)
    if not why:
        folders = {name for name in whole if name.endswith("/")}
        assert set(shown) == set(whole) - folders
    given_texts = {f"{path}:{name}{suffix}": text for name, suffix, text in made}
    for document in found:
        if not document.error:
            assert document.text == given_texts[document.name]
            assert PurePosixPath(document.name).suffix in (".txt", ".json")


def pieces(documents: list[list[int]]) -> list[list[int]]:
    """A list at a time, the slow way: a separator ends a document, and so does the end of one."""
    found = []
    for document in documents:
        open_piece: list[int] = []
        for number, one in enumerate(document):
            if one == BY.separator:
                found.append(open_piece)
                open_piece = []
            else:
                open_piece.append(one)
            if number == len(document) - 1 and one != BY.separator:
                found.append(open_piece)
        if not document:
            found.append([])
    return found


@examples(50)
@given(
    documents=st.lists(ids, min_size=1, max_size=6),
    wide=st.booleans(),
    cut=st.none() | st.tuples(st.integers(0, 10**6), st.booleans()),
)
def test_tokens(documents: list[list[int]], wide: bool, cut: tuple[int, bool] | None) -> None:
    """Cut off, the ids or their index: an error, and only documents that were there."""
    with tempfile.TemporaryDirectory() as folder:
        code, dtype = (4, "<i4") if wide else (8, "<u2")
        bin_file = write_megatron(Path(folder) / "a.bin", documents, code, dtype)
        ds_file = write_datatrove(Path(folder) / "a.ds", documents, width=4 if wide else 2)
        for path, index in (
            (bin_file, Path(folder, "a.idx")),
            (ds_file, Path(folder, "a.ds.index")),
        ):
            if cut is not None:
                torn = index if cut[1] else path
                data = torn.read_bytes()
                torn.write_bytes(data[: cut[0] % len(data)] if data else b"")
            found, why = started(path)
            kept = [document.tokens.ids.tolist() for document in found if document.tokens]
            expected = pieces(documents)
            if cut is None:
                assert not why and kept == expected
            else:
                assert kept == expected[: len(kept)]
                # without an index entry of an empty document at the end nothing is missing
                assert why or sum(map(len, kept)) == sum(map(len, expected))


@examples(100)
@given(template=st.text("{}\\nt ab", max_size=9), value=texts)
def test_templates(template: str, value: str) -> None:
    try:
        made = template_of(template)
    except UserError as error:
        assert "\n" not in str(error)
        return
    found = record("it", made, dict.fromkeys(made.fields, value), 0)
    if not made.pieces:
        assert found.text == value
        return
    plain = template.replace("\\\\", "\1").replace("\\n", "\n").replace("\\t", "\t")
    for field in made.fields:
        plain = plain.replace("{" + field + "}", "\2" + "\3")
    assert found.text.count(value) >= plain.count("\3") if value else found.text
