"""The members of a tar file, one after another: all of them, or an error; nothing is extracted.

The standard library's reader takes a header that is damaged for the end of the file, believes the
sizes of the headers before it (a name may be gigabytes then), and fills the holes of a sparse
member, however large they are said to be. A member here is what its header says, and its data are
read only when they are asked for. Formats: POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU.
"""

from __future__ import annotations

from typing import IO, NamedTuple

from nlscale.data.formats.base import UnreadableError

BLOCK = 512
FILE, FOLDER, SPARSE = "file", "folder", "sparse file"
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"5": FOLDER, b"S": SPARSE}
_KINDS |= dict.fromkeys((b"1", b"2"), "link") | dict.fromkeys((b"3", b"4", b"6"), "device or pipe")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"L", b"K", (b"x", b"X"), b"g"
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_MOST_HEADER = 1 << 20  # bytes of a name, or of what pax says of a member
_MOST_SIZE = 1 << 60  # bytes of a member
_PIECE = 1 << 20


class Member(NamedTuple):
    """What a header says: `kind` is `FILE`, `FOLDER`, `SPARSE`, "link" or another in words."""

    name: str
    kind: str
    size: int


class Tar:
    """A tar file as it is read from its start; what is behind its end is read, too.

    Args:
        stream: its bytes.
        seekable: whether `stream` can leave something out without reading it.
    """

    def __init__(self, stream: IO[bytes], seekable: bool) -> None:
        self._stream = stream
        self._seekable = seekable
        self._left = 0
        self._padding = 0

    def next(self) -> Member | None:
        """The next member; None at the end.

        Raises:
            UnreadableError: the file breaks off, or is damaged.
        """
        named, said, ended = "", dict[str, str](), False
        while True:
            self._skip(self._left + self._padding)
            block = self._stream.read(BLOCK)
            if not block and ended:
                return None
            if len(block) < BLOCK:
                raise _damaged("it breaks off")
            if not block.strip(b"\0"):
                ended = True  # of the first of several, where they lie one behind the other
                continue
            ended = False
            kind, size = block[156:157], self._header(block)
            if kind == _LONG_NAME:
                named = self._extra(size).partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind in _PAX:
                said = _pax(self._extra(size))
            elif kind in (_LONG_LINK, _PAX_OF_ALL):
                self._extra(size)
            else:
                return self._member(block, kind, named, said)

    def read(self) -> bytes:
        """The data of the member. Raises UnreadableError: the file breaks off in it."""
        pieces = []
        while self._left:
            piece = self._stream.read(min(self._left, _PIECE))
            if not piece:
                raise _damaged("it breaks off")
            pieces.append(piece)
            self._left -= len(piece)
        return b"".join(pieces)

    def _header(self, block: bytes) -> int:
        """The size of what follows a header, which is to be skipped."""
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise _damaged("a header of it has another checksum")
        size = _number(block[124:136])
        self._follow(0 if block[156:157] in _NO_DATA else size)
        return size

    def _follow(self, size: int) -> None:
        if not 0 <= size <= _MOST_SIZE:
            raise _damaged(f"a header of it gives a size of {size:,} bytes")
        self._left, self._padding = size, -size % BLOCK

    def _member(self, block: bytes, code: bytes, named: str, said: dict[str, str]) -> Member:
        name = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
            name = prefix + b"/" + name
        kind = _KINDS.get(code, f"member of type {ascii(code)[2:-1]}")
        if "size" in said and code not in _NO_DATA:
            self._follow(_decimal(said["size"]))
        more = block[482] if code == b"S" else 0
        while more:  # where the holes are, before the data
            extension = self._stream.read(BLOCK)
            if len(extension) < BLOCK:
                raise _damaged("it breaks off")
            more = extension[504]
        if any(key.startswith("GNU.sparse.") for key in said):
            kind = SPARSE
        full = said.get("path") or named or name.decode("utf-8", "surrogateescape")
        return Member(full, FOLDER if kind == FILE and full.endswith("/") else kind, self._left)

    def _extra(self, size: int) -> bytes:
        """What follows a header that is of the next one."""
        if size > _MOST_HEADER:
            raise _damaged(f"a header of it has {size:,} bytes")
        return self.read()

    def _skip(self, size: int) -> None:
        self._left = self._padding = 0
        if self._seekable and size > _PIECE:
            self._stream.seek(size, 1)  # beyond the end, too: then no header follows
            return
        while size:
            piece = self._stream.read(min(size, _PIECE))
            if not piece:
                raise _damaged("it breaks off")
            size -= len(piece)


def _number(field: bytes) -> int:
    """A number of a header: octal, or in binary behind a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise _damaged("a header of it has no number where one must be")
    return int(digits, 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise _damaged("a header of it has no number where one must be")
    return int(text)


def _pax(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, the length being of all of it."""
    said = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        size = _decimal(length.decode("ascii", "replace"))
        record, newline = rest[: size - len(length) - 2], data[size - 1 : size]
        key, equals, value = record.partition(b"=")
        if size > len(data) or newline != b"\n" or not equals:
            raise _damaged("a header of it is no list of keys")
        said[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[size:]
    return said


def _damaged(why: str) -> UnreadableError:
    return UnreadableError("damaged", f"damaged ({why})")
