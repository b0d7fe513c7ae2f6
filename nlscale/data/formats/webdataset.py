"""Samples of webdataset: members of a tar file whose names differ in their last suffix only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from nlscale.data.formats import base
from nlscale.data.formats.base import (
    NOT_TEXT,
    Document,
    UnreadableError,
    failed,
    left_out,
    too_large,
    utf8,
)
from nlscale.data.formats.records import parsed
from nlscale.data.formats.tar import BLOCK, FILE, FOLDER, Member, Tar
from nlscale.data.formats.text import Stream

_RECORD, _TEXT = ".json", ".txt"
_MOST_SUFFIX = 12  # characters that are counted apart
_Sample = dict[str, Document | tuple[str, bytes, int]]
"""Name, data and bytes that they took, by suffix; or what stands in their place."""


def read_webdataset(text: Stream) -> Iterator[Document]:
    """A sample a document: the field of its .json, if it has it, or else its .txt.

    Nothing is extracted; whatever else is in the file is left out, counted by what it is.

    Raises:
        UnreadableError: the file breaks off, or is damaged.
    """
    tar = Tar(text.stream, seekable=not text.packed)
    sample: _Sample = {}
    last = ""
    try:
        while (member := tar.next()) is not None:
            name, suffix = f"{text.path}:{member.name}", PurePosixPath(member.name).suffix.lower()
            if (other := _other(member, suffix)) is not None:
                kind, size = other
                if member.kind != FOLDER:
                    yield left_out(name, text.consumed(_taken(member)), kind, kind, size)
                continue
            key = member.name[: -len(suffix)]
            if key != last or suffix in sample:
                yield from _documents(text, sample)
                sample, last = {}, key
            if member.size > base.LARGEST:
                why = f"it has {member.size:,} bytes, {too_large()}"
                consumed = text.consumed(_taken(member))
                sample[suffix] = failed(name, consumed, "too large", why)
                continue
            data = tar.read()
            sample[suffix] = name, data, text.consumed(_taken(member))
    except UnreadableError:
        yield from _documents(text, sample)  # which was read before the file broke off
        raise
    yield from _documents(text, sample)


def _taken(member: Member) -> int:
    """Bytes of the tar file that it takes."""
    return BLOCK + member.size + -member.size % BLOCK


def _other(member: Member, suffix: str) -> tuple[str, int] | None:
    """Why a member is left out, and its bytes that could be text; None: it is not."""
    path = PurePosixPath(member.name)
    if member.kind != FILE:
        return f"{member.kind} in a tar", 0
    if path.is_absolute() or ".." in path.parts:
        return "path outside of its tar", 0
    if path.name.startswith("."):
        return "hidden in a tar", 0
    if suffix in (_RECORD, _TEXT):
        return None
    plain = suffix[1:].isalnum() and suffix.isascii() and len(suffix) <= _MOST_SUFFIX
    size = 0 if suffix in NOT_TEXT else member.size
    return f"{suffix if plain else 'another member'} in a tar", size


def _documents(text: Stream, sample: _Sample) -> Iterator[Document]:
    """The document of a sample, and what of it is left out for it."""
    record = plain = None
    if (found := sample.get(_RECORD)) is not None:
        record = found if isinstance(found, Document) else _record(text, *found)
    if (found := sample.get(_TEXT)) is not None:
        plain = found if isinstance(found, Document) else _plain(*found)
    if record is not None and plain is not None:
        unused = plain if not record.error else record
        kind = "a .txt beside a .json with the text" if unused is plain else "a .json beside a .txt"
        yield left_out(unused.name, unused.consumed, kind, unused.error or kind)
        record, plain = (None, plain) if unused is record else (record, None)
    yield from (document for document in (record, plain) if document is not None)


def _record(text: Stream, name: str, data: bytes, consumed: int) -> Document:
    return parsed(name, text.template, data, consumed)


def _plain(name: str, data: bytes, consumed: int) -> Document:
    try:
        return Document(name, data.decode("utf-8"), data, consumed)
    except UnicodeDecodeError as error:
        return failed(name, consumed, *utf8(error))
