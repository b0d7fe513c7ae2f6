"""Reading the documents of a file, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from nlscale.data.compressed import COMPRESSED, DAMAGE, decompressed
from nlscale.data.index import DEFAULT_FIELD
from nlscale.data.spans import COMPLETION, MASK, PROMPT, Spans, SpansError, spans_of
from nlscale.data.tally import shown

LARGEST = 1 << 32  # bytes of a document; a compressed one can be a thousand times its file
NO_FIELD, NO_RECORD = "no such field", "not an object"
_TOO_LARGE = f"more than {LARGEST >> 30} GiB in one document"
_NAMED_FIELDS = 8
_SHOWN = 40  # characters of a name that comes out of a file
_LFS = b"version https://git-lfs.github.com/spec/"
_TYPES = {type(None): "null", bool: "a boolean", float: "a number", int: "a number"}
_TYPES |= {list: "a list", dict: "an object", str: "a string", bytes: "bytes"}
# not int: of one with 5,000 digits Python makes an error, which is none of the text's
_DECODER = json.JSONDecoder(parse_int=float)


class SourceFile(NamedTuple):
    """A file to read: `name` is its path within the source, `size` is in bytes.

    `group` is the number of the source that it was found in.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    group: int = 0


class Document(NamedTuple):
    """A document, or what stands in its place when it cannot be read (`error` is not empty).

    `text` and `data` are the same text as str and as UTF-8. `consumed` is about how many bytes
    of the source file it took; over a file they add up to its size. `kind` is the error in two or
    three words, the same for all documents that have it. `spans` are what counts of the text; None:
    all of it does.
    """

    name: str
    text: str
    data: bytes
    consumed: int
    error: str = ""
    kind: str = ""
    spans: Spans | None = None


class UnreadableError(Exception):
    """A file that cannot be read, or not to its end: why, and `kind`, as that of a `Document`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def format_of(name: str) -> tuple[str, str]:
    """The suffixes of a file's name in lower case: of its format, and of its compression or "".

    The first is "" where the file is none that can be read.
    """
    path = Path(name.lower())
    packed = path.suffix if path.suffix in COMPRESSED else ""
    suffix = Path(path.stem).suffix if packed else path.suffix
    readable = suffix in _TEXT or (suffix == PARQUET and not packed)
    return (suffix if readable else ""), packed


def is_plain(name: str) -> bool:
    """Whether a file of this name is one document, and has no records."""
    return format_of(name)[0] in _PLAIN


def read_documents(file: SourceFile, field: str = DEFAULT_FIELD) -> Iterator[Document]:
    """The documents of a file in order, those that cannot be read among them.

    Args:
        field: what the text of a record is called, in the formats that have records

    Raises:
        UnreadableError: the file cannot be read, or only so far.
    """
    suffix, packed = format_of(file.path.name)
    try:
        _refuse_pointer(file.path)
        if suffix == PARQUET:
            yield from _read_parquet(file, field)
            return
        with open(file.path, "rb", buffering=-1 if not packed else 0) as raw:
            stream = decompressed(raw, packed)
            yield from _TEXT[suffix](_Text(str(file.path), field, raw, stream))
    except (*DAMAGE, MemoryError, RecursionError, ValueError) as error:
        raise UnreadableError(*_reason(error)) from error


class _Text:
    """A stream of text, and where it comes from."""

    def __init__(self, path: str, field: str, raw: IO[bytes], stream: BinaryIO) -> None:
        self.path = path
        self.field = field
        self.stream = stream
        self._raw = raw
        self._told = 0

    def consumed(self, size: int) -> int:
        """Bytes of the file that a document of `size` bytes took: none, or many, if compressed."""
        if self.stream is self._raw:
            return size
        before, self._told = self._told, self._raw.tell()
        return self._told - before

    def whole(self, start: bytes = b"") -> bytes:
        """`start` and all that follows. Raises UnreadableError: more than a document may have."""
        data = start + self.stream.read(max(0, LARGEST + 1 - len(start)))
        if len(data) > LARGEST:
            raise UnreadableError("too large", f"it has {_TOO_LARGE}; cut it into more")
        return data

    def lines(self, number: int = 0) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line that is not blank, `number` lines having been read."""
        while line := self.stream.readline(LARGEST + 1):
            number += 1
            if line.strip():
                yield number, line
            while len(line) > LARGEST and not line.endswith(b"\n"):  # the rest of a longer one
                line = self.stream.readline(1 << 20) or b"\n"


def _read_plain(text: _Text) -> Iterator[Document]:
    data = text.whole()
    try:
        yield Document(text.path, data.decode("utf-8"), data, text.consumed(len(data)))
    except UnicodeDecodeError as error:
        yield _failed(text.path, text.consumed(len(data)), *_utf8(error))


def _read_lines(text: _Text) -> Iterator[Document]:
    for number, line in text.lines():
        yield _line(text, number, line)


def _read_json(text: _Text) -> Iterator[Document]:
    """JSON lines, if one of the first two is an object by itself; one object, or a list of them."""
    start: list[bytes] = []
    found: list[tuple[int, bytes]] = []
    while len(found) < 2 and (line := text.stream.readline(LARGEST + 1)):
        start.append(line)
        if line.strip():
            found.append((len(start), line))
    if any(_is_object(line) for _, line in found):
        for number, line in chain(found, text.lines(len(start))):
            yield _line(text, number, line)
        return
    data = text.whole(b"".join(start))
    if not data.strip():
        return
    value = _parse(data)
    records = value if isinstance(value, list) else [value]
    each = text.consumed(len(data)) // max(1, len(records))
    for number, record in enumerate(records):
        yield _record(f"{text.path}[{number}]", text.field, record, each)


PARQUET = ".parquet"
_PLAIN = (".txt", ".rst", ".md", ".py")
_TEXT: dict[str, Callable[[_Text], Iterator[Document]]] = {
    **dict.fromkeys(_PLAIN, _read_plain),
    **dict.fromkeys((".jsonl", ".ndjson"), _read_lines),
    ".json": _read_json,
}
SUFFIXES = (*_TEXT, PARQUET)
"""Of what can be read, in lower case; all but the last may be followed by one of `COMPRESSED`."""


def _read_parquet(file: SourceFile, field: str) -> Iterator[Document]:
    with pyarrow.parquet.ParquetFile(file.path) as table:
        names, rows = _columns(table.schema_arrow.names, field), table.metadata.num_rows
        row, each = 0, file.size // max(1, rows)
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(1024, row_groups=[group], columns=names):
                for values in zip(*map(batch.column, names), strict=True):
                    name = f"{file.path}:{row}"
                    row += 1
                    try:
                        record = {n: v.as_py() for n, v in zip(names, values, strict=True)}
                    except UnicodeDecodeError as error:
                        yield _failed(name, each, *_utf8(error))
                        continue
                    yield _record(name, field, record, each)
        if row != rows:
            raise UnreadableError("damaged", f"it has {row:,} of the {rows:,} rows that it says")


def _columns(there: list[str], field: str) -> list[str]:
    """Those to be read of a table. Raises UnreadableError: they are not there, each once."""
    in_parts = field not in there and {PROMPT, COMPLETION} <= set(there)
    wanted = [PROMPT, COMPLETION] if in_parts else [field]
    if MASK in there and MASK not in wanted:
        wanted.append(MASK)
    for name in wanted:
        if there.count(name) != 1:
            several = "more than one" if name in there else "no"
            raise UnreadableError("no such column", f"{several} column {name!r} {_has(there)}")
    return wanted


def _line(text: _Text, number: int, line: bytes) -> Document:
    name, consumed = f"{text.path}:{number}", text.consumed(len(line))
    if len(line) > LARGEST:
        return _failed(name, consumed, "too large", f"it has {_TOO_LARGE}")
    try:
        record = _parse(line)
    except UnicodeDecodeError as error:
        return _failed(name, consumed, *_utf8(error))
    except (ValueError, RecursionError) as error:
        return _failed(name, consumed, "not JSON", f"not JSON ({error})")
    return _record(name, text.field, record, consumed)


def _parse(data: bytes) -> Any:
    # NUL bytes and byte order marks: whole files in UTF-16 are JSON too
    plain = b"\0" not in data and not data.startswith(b"\xef\xbb\xbf")
    return _DECODER.decode(data.decode("utf-8" if plain else json.detect_encoding(data)))


def _is_object(line: bytes) -> bool:
    if line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"{":
        return False
    try:
        return isinstance(_parse(line), dict)
    except (ValueError, RecursionError):
        return False


def _record(name: str, field: str, record: Any, consumed: int) -> Document:
    if not isinstance(record, dict):
        return _failed(name, consumed, NO_RECORD, f"it is {_type(record)}, not an object")
    mask = record.get(MASK) if field != MASK else None
    if field in record:
        return _checked(name, consumed, {field: record[field]}, mask)
    if {PROMPT, COMPLETION} <= record.keys():
        return _checked(name, consumed, {key: record[key] for key in (PROMPT, COMPLETION)}, mask)
    return _failed(name, consumed, NO_FIELD, f"no {field!r} {_has(list(record))}")


def _checked(name: str, consumed: int, parts: dict[str, Any], mask: Any) -> Document:
    """The document of a text in one part, or in two of which the second counts."""
    for key, part in parts.items():
        if not isinstance(part, str):
            why = f"its {key!r} is {_type(part)}, not a string"
            return _failed(name, consumed, f"{key!r} not a string", why)
    text, in_parts = "".join(parts.values()), len(parts) > 1
    if in_parts and mask is not None:
        why = f"{PROMPT!r} and {COMPLETION!r} say what counts, and so does {MASK!r}: leave one out"
        return _failed(name, consumed, "two masks", why)
    try:
        spans = ((len(parts[PROMPT]), len(text)),) if in_parts else spans_of(mask, len(text))
        return Document(name, text, text.encode("utf-8"), consumed, spans=spans)
    except SpansError as error:
        return _failed(name, consumed, error.kind, str(error))
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        return _failed(name, consumed, *_utf8(error))


def _failed(name: str, consumed: int, kind: str, error: str) -> Document:
    return Document(name, "", b"", consumed, error, kind)


def _utf8(error: UnicodeError) -> tuple[str, str]:
    """Kind and error of a text that is not UTF-8; the error's own words would quote the text."""
    at = getattr(error, "start", 0)
    return "not UTF-8", f"not UTF-8 ({getattr(error, 'reason', 'odd')}, at {at:,})"


def _type(value: object) -> str:
    return _TYPES.get(type(value), type(value).__name__)


def _has(names: list[str]) -> str:
    """The fields that there are, in brackets."""
    if not names:
        return "(there is none)"
    more = ", ..." if len(names) > _NAMED_FIELDS else ""
    return f"(there are {', '.join(shown(name, _SHOWN) for name in names[:_NAMED_FIELDS])}{more})"


def _refuse_pointer(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        if file.read(len(_LFS)) == _LFS:
            raise UnreadableError("pointer of git-lfs", "it is not the file itself; git lfs pull")


def _reason(error: BaseException) -> tuple[str, str]:
    """Kind and words for what reading a file has raised."""
    if isinstance(error, OSError) and error.strerror:
        return "unreadable", error.strerror
    words = str(error).partition("\n")[0]
    return "damaged", f"damaged ({shown(words or type(error).__name__, 200)})"
