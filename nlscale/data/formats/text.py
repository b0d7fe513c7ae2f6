"""Text, one document a file or in records of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import IO, BinaryIO

from nlscale.data.formats import base
from nlscale.data.formats.base import Document, UnreadableError, failed, too_large, utf8
from nlscale.data.formats.records import Template, is_object, parse, parsed, record


class Stream:
    """A stream of bytes, and where it comes from.

    Attributes:
        path: of its file.
        template: of the text of a record.
        raw: the file.
        stream: what it holds; the file itself where it is not compressed.
    """

    def __init__(self, path: str, template: Template, raw: IO[bytes], stream: BinaryIO) -> None:
        self.path = path
        self.template = template
        self.stream = stream
        self.packed = stream is not raw
        self._raw = raw
        self._told = 0

    def consumed(self, size: int) -> int:
        """Bytes of the file that a document of `size` bytes took: none, or many, if compressed."""
        if not self.packed:
            return size
        before, self._told = self._told, self._raw.tell()
        return self._told - before

    def whole(self, start: bytes = b"") -> bytes:
        """`start` and all that follows. Raises UnreadableError: more than a document may have."""
        data = start + self.stream.read(max(0, base.LARGEST + 1 - len(start)))
        if len(data) > base.LARGEST:
            raise UnreadableError("too large", f"it has {too_large()}; cut it into more")
        return data

    def lines(self, number: int = 0) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line that is not blank, `number` lines having been read."""
        while line := self.stream.readline(base.LARGEST + 1):
            number += 1
            if line.strip():
                yield number, line
            while len(line) > base.LARGEST and not line.endswith(b"\n"):  # the rest of a longer one
                line = self.stream.readline(1 << 20) or b"\n"


def read_plain(text: Stream) -> Iterator[Document]:
    """One document."""
    data = text.whole()
    try:
        yield Document(text.path, data.decode("utf-8"), data, text.consumed(len(data)))
    except UnicodeDecodeError as error:
        yield failed(text.path, text.consumed(len(data)), *utf8(error))


def read_lines(text: Stream) -> Iterator[Document]:
    """One a line."""
    for number, line in text.lines():
        yield _line(text, number, line)


def read_json(text: Stream) -> Iterator[Document]:
    """JSON lines, if one of the first two is an object by itself; one object, or a list of them."""
    start: list[bytes] = []
    found: list[tuple[int, bytes]] = []
    while len(found) < 2 and (line := text.stream.readline(base.LARGEST + 1)):
        start.append(line)
        if line.strip():
            found.append((len(start), line))
    if any(is_object(line) for _, line in found):
        for number, line in chain(found, text.lines(len(start))):
            yield _line(text, number, line)
        return
    data = text.whole(b"".join(start))
    if not data.strip():
        return
    value = parse(data)
    records = value if isinstance(value, list) else [value]
    each = text.consumed(len(data)) // max(1, len(records))
    for number, one in enumerate(records):
        yield record(f"{text.path}[{number}]", text.template, one, each)


def _line(text: Stream, number: int, line: bytes) -> Document:
    name, consumed = f"{text.path}:{number}", text.consumed(len(line))
    if len(line) > base.LARGEST:
        return failed(name, consumed, "too large", f"it has {too_large()}")
    return parsed(name, text.template, line, consumed)
