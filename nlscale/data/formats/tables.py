"""Tables, a row a document: CSV with a header, and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet

from nlscale.data.formats import base
from nlscale.data.formats.base import (
    Document,
    SourceFile,
    UnreadableError,
    failed,
    too_large,
    utf8,
)
from nlscale.data.formats.records import Template, columns, parse, record
from nlscale.data.formats.text import Stream
from nlscale.data.spans import MASK


class _Lines:
    """The lines of a stream as the reader of CSV takes them; bytes of the record so far: `size`."""

    def __init__(self, text: Stream) -> None:
        self._text = text
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        mark = b"\xef\xbb\xbf"
        while line := self._text.stream.readline(base.LARGEST + 1):
            self.size += len(line)
            if self.size > base.LARGEST:  # a quote that is never closed, more often than a text
                raise UnreadableError("too large", f"it has {too_large()}, or a quote left open")
            # what is not UTF-8 is found in the field that it is in
            yield line.removeprefix(mark).decode("utf-8", errors="surrogateescape")
            mark = b""

    def take(self) -> int:
        """Bytes of the record that has been read."""
        size, self.size = self.size, 0
        return size


def read_csv(text: Stream) -> Iterator[Document]:
    """A row a document, after one with the names of the columns; a `mask` is written as JSON.

    Raises:
        UnreadableError: there is no such column, or quotes are not as they must be: where the next
            row begins is not known then.
    """
    csv.field_size_limit(max(csv.field_size_limit(), base.LARGEST))  # of the whole process
    lines = _Lines(text)
    rows = csv.reader(lines, strict=True)
    names: list[str] = []
    wanted: list[str] = []
    row = 0
    try:
        for values in rows:
            if not values:
                continue  # a blank line
            if not names:
                names, wanted = values, columns(values, text.template)
                continue
            consumed, name = text.consumed(lines.take()), f"{text.path}:{row}"
            row += 1
            if len(values) != len(names):
                why = f"it has {len(values):,} columns, the first row names {len(names):,}"
                yield failed(name, consumed, "another number of columns", why)
                continue
            yield _row(name, text.template, names, wanted, values, consumed)
    except csv.Error as error:
        raise UnreadableError("damaged", f"damaged at line {rows.line_num:,} ({error})") from None


def _row(
    name: str,
    template: Template,
    names: list[str],
    wanted: list[str],
    values: list[str],
    consumed: int,
) -> Document:
    value: dict[str, Any] = {n: v for n, v in zip(names, values, strict=True) if n in wanted}
    if MASK in value and MASK not in template.fields:
        try:
            value[MASK] = parse(value[MASK].encode()) if value[MASK] else None
        except (ValueError, RecursionError) as error:
            return failed(name, consumed, "mask not JSON", f"its {MASK!r} is not JSON ({error})")
    return record(name, template, value, consumed)


def read_parquet(file: SourceFile, template: Template) -> Iterator[Document]:
    """A row a document. Raises UnreadableError: there is no such column, or rows are missing."""
    with pyarrow.parquet.ParquetFile(file.path) as table:
        names, rows = columns(table.schema_arrow.names, template), table.metadata.num_rows
        row, each = 0, file.size // max(1, rows)
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(1024, row_groups=[group], columns=names):
                for values in zip(*map(batch.column, names), strict=True):
                    name = f"{file.path}:{row}"
                    row += 1
                    try:
                        value = {n: v.as_py() for n, v in zip(names, values, strict=True)}
                    except UnicodeDecodeError as error:
                        yield failed(name, each, *utf8(error))
                        continue
                    yield record(name, template, value, each)
        if row != rows:
            raise UnreadableError("damaged", f"it has {row:,} of the {rows:,} rows that it says")
