"""Tables in CSV, and texts made of several fields."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from data.corpora import PACK, everything, left_out, lines, small
from data.formats.sources import TEXTS, csv_of, parquet_of, read, tar_of, texts_of

from nlscale.data.documents import UnreadableError, template_of
from nlscale.errors import UserError

ROWS = [{"title": f"No. {n}", "text": text, "n": n} for n, text in enumerate(TEXTS)]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def kinds(path: Path, field: str = "text") -> list[str]:
    return [document.kind or document.text for document in read(path, field)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text\none\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbftext\r\none\r\n", ["one"]),
        (b'text\n\n"one"\n\n""\n', ["one", ""]),
        (b'text\n"a\nb"\n', ["a\nb"]),
        (b"text,b\none,1\ntwo\nthree,3,3\n", ["one"] + ["another number of columns"] * 2),
        (b"text\none\n\xff\ntwo", ["one", "not UTF-8", "two"]),
        (b'b,text\n1,"one\n\xff"\n2,two', ["not UTF-8", "two"]),
        (b"b,text\n\xff,one\n", ["one"]),
        (b"text,mask\none,\n" + b'two,"[[0, 1]]"\nthree,[[0]\n', ["one", "two", "mask not JSON"]),
        (b"prompt,completion\na,b\n", ["ab"]),
        (b"text\n", []),
        (b"", []),
    ],
)
def test_rows(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert kinds(put(tmp_path / "a.csv", content)) == expected


def test_what_counts_of_a_row(tmp_path: Path) -> None:
    content = b'mask,text\n"[[0, 2]]",one\n,two\n'
    spans = [document.spans for document in read(put(tmp_path / "a.csv", content))]
    assert spans == [((0, 2),), None]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'text\none\n"two\nthree\n', r"damaged at line 4 \(unexpected end of data\)"),
        (b'text\n"a" b\n', "damaged at line 2"),
        (b"body\none\n", r"no column 'text' \(there are body\)"),
        (b"text,text\none,two\n", "more than one column 'text'"),
        (b"text\rone\r", "damaged"),
    ],
)
def test_a_table_that_cannot_be_read_on(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UnreadableError, match=says):
        read(put(tmp_path / "a.csv", content))


def test_fields_of_any_size_and_nul(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = "x" * 300_000  # more than the library takes by itself
    assert texts_of(put(tmp_path / "a.csv", csv_of([large, "a"]))) == [large, "a"]
    monkeypatch.setattr("nlscale.data.formats.base.LARGEST", 1000)
    with pytest.raises(UnreadableError, match="or a quote left open"):
        read(put(tmp_path / "b.csv", b'text\none\n"' + b"two\n" * 300))
    with pytest.raises(UnreadableError, match="or a quote left open"):
        read(put(tmp_path / "c.csv.gz", gzip.compress(b"text\n" + b"x" * (1 << 20))))
    found: list[str] = []
    try:  # Python 3.10 takes no NUL
        found = kinds(put(tmp_path / "d.csv", b"text\none\0two\n"))
    except UnreadableError as error:
        assert "NUL" in str(error)
    assert found in ([], ["one\0two"])


@pytest.mark.parametrize("packed", [packed for packed in PACK if packed])
def test_a_compressed_table_that_breaks_off(tmp_path: Path, packed: str) -> None:
    whole = PACK[packed](csv_of(TEXTS * 20))
    put(tmp_path / "in" / f"a.csv{packed}", whole[: len(whole) // 2])
    put(tmp_path / "in" / "b.csv", csv_of(["one", "two", "three"]))
    says = rf"1 of 2 files cannot be read .*damaged 1.*a\.csv{packed}"
    with pytest.raises(UserError, match=says):
        small([str(tmp_path / "in")], tmp_path / "out")


def test_a_table_of_figures_is_left_out(tmp_path: Path) -> None:
    """As a .json without text is: a folder of text has such files, too."""
    put(tmp_path / "in" / "a.jsonl", lines([f"{i}" * 200 for i in range(100)]))
    put(tmp_path / "in" / "figures.csv", b"x,y\n1,2\n")
    index = small([str(tmp_path / "in")], tmp_path / "out")
    assert left_out(index) == {".csv without 'text'": 1}
    assert index["lost_files"]["count"] == 0
    with pytest.raises(UserError, match=r"\.csv without 'text' 1 .*are x, y.*--text-field"):
        small([str(tmp_path / "in" / "figures.csv")], tmp_path / "other", max_lost=1.0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("text", "b"),
        ("{text}", "b"),
        ("{title}: {text}", "a: b"),
        (r"{title}\n\n{text}\t.", "a\n\nb\t."),
        ("{title}\n{text}", "a\nb"),
        (r"{{{title}}} \\n {text}{text}", r"{a} \n bb"),
        (r"\d{text}", r"\db"),
    ],
)
def test_templates(tmp_path: Path, template: str, expected: str) -> None:
    record = {"title": "a", "text": "b", "more": 5}
    path = put(tmp_path / "a.jsonl", json.dumps(record).encode())
    assert texts_of(path, template) == [expected]


@pytest.mark.parametrize("template", ["{", "}", "{a}}", "{}", "{{}}", "{a{b}}", "}{"])
def test_templates_that_are_none(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match="the template") as caught:
        template_of(template)
    assert "\n" not in str(caught.value)
    put(tmp_path / "a.jsonl", lines(["one", "two"]))
    with pytest.raises(UserError, match="the template"):
        small([str(tmp_path / "a.jsonl")], tmp_path / "out", text_field=template)


def test_a_template_in_every_format_of_records(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    template = r"# {title}\n\n{text}"
    expected = [f"# {row['title']}\n\n{row['text']}" for row in ROWS]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    assert texts_of(put(tmp_path / "a.jsonl", content), template) == expected
    assert texts_of(put(tmp_path / "a.json", json.dumps(ROWS).encode()), template) == expected
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", template) == expected
    tar = tar_of([(f"{row['n']}.json", json.dumps(row).encode()) for row in ROWS])
    assert texts_of(put(tmp_path / "a.tar", tar), template) == expected
    titled = csv_of([str(row["title"]) for row in ROWS], "title")
    assert texts_of(put(tmp_path / "a.csv", titled), "{id} {title}") == [
        f"{row['n']} {row['title']}" for row in ROWS
    ]


def test_what_a_template_lacks_is_lost_by_reason(tmp_path: Path) -> None:
    records = [
        {"title": "a", "text": "b"},
        {"text": "b"},
        {"title": None, "text": "b"},
        {"title": "a", "text": "b", "mask": [[0, 1]]},
        {"prompt": "a", "completion": "b"},
        {"title": "c", "text": "d"},
    ]
    path = put(tmp_path / "a.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in records))
    field = "{title}-{text}"
    index = small([str(path)], tmp_path / "out", max_lost=1.0, text_field=field)
    assert everything(tmp_path / "out") == ["a-b", "c-d"]
    reasons = {"no such field": 2, "'title' not a string": 1, "mask with a template": 1}
    assert index["skipped"]["reasons"] == reasons
    assert index["text_field"] == field
    with pytest.raises(UnreadableError, match="no column 'title'"):
        read(put(tmp_path / "a.parquet", parquet_of(TEXTS)), field)
