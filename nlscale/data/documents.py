"""Reading the documents of a file, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nlscale.data.compressed import COMPRESSED, DAMAGE, decompressed
from nlscale.data.encoders.base import Tokenizer
from nlscale.data.formats.base import Document, SourceFile, Tokens, UnreadableError
from nlscale.data.formats.records import NO_COLUMN, NO_FIELD, NO_RECORD, Template, template_of
from nlscale.data.formats.tables import read_csv, read_parquet
from nlscale.data.formats.text import Stream, read_json, read_lines, read_plain
from nlscale.data.formats.tokens import TOKENS, read_tokens
from nlscale.data.formats.webdataset import read_webdataset
from nlscale.data.index import DEFAULT_FIELD
from nlscale.data.tally import shown
from nlscale.errors import UserError

__all__ = [
    "NO_COLUMN",
    "NO_FIELD",
    "NO_RECORD",
    "SUFFIXES",
    "Document",
    "SourceFile",
    "Tokens",
    "UnreadableError",
    "format_of",
    "is_plain",
    "of_programs",
    "read_documents",
    "template_of",
]

_LFS = b"version https://git-lfs.github.com/spec/"
PARQUET = ".parquet"
_PLAIN = (".txt", ".rst", ".md", ".py")
_TEXT: dict[str, Callable[[Stream], Iterator[Document]]] = {
    **dict.fromkeys(_PLAIN, read_plain),
    **dict.fromkeys((".jsonl", ".ndjson"), read_lines),
    ".json": read_json,
    ".csv": read_csv,
    ".tar": read_webdataset,
}
_FILES: dict[str, Callable[[SourceFile, Template, Tokenizer | None], Iterator[Document]]] = {
    PARQUET: lambda file, template, tokenizer: read_parquet(file, template),
    **dict.fromkeys(TOKENS, lambda file, template, tokenizer: read_tokens(file, tokenizer)),
}
_OF_PROGRAMS = {".csv": frozenset({NO_COLUMN}), ".json": frozenset({NO_FIELD, NO_RECORD})}
"""Where nothing else is wrong with it, a file of the suffix is figures or settings of some program,
more often than text."""
SUFFIXES = (*_TEXT, *_FILES)
"""Of what can be read, in lower case; the text ones may be followed by one of `COMPRESSED`."""


def format_of(name: str) -> tuple[str, str]:
    """The suffixes of a file's name in lower case: of its format, and of its compression or "".

    The first is "" where the file is none that can be read.
    """
    path = Path(name.lower())
    packed = path.suffix if path.suffix in COMPRESSED else ""
    suffix = Path(path.stem).suffix if packed else path.suffix
    readable = suffix in _TEXT or (suffix in _FILES and not packed)
    return (suffix if readable else ""), packed


def is_plain(name: str) -> bool:
    """Whether a file of this name is one document, and has no records."""
    return format_of(name)[0] in _PLAIN


def of_programs(name: str) -> frozenset[str]:
    """Kinds of errors for which a file of this name is taken for none of text."""
    return _OF_PROGRAMS.get(format_of(name)[0], frozenset())


def read_documents(
    file: SourceFile, field: str = DEFAULT_FIELD, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    """The documents of a file in order, those that cannot be read or are left out among them.

    Args:
        field: what the text of a record is called, in the formats that have records; or a template
            of several, see `nlscale.data.formats.records.template_of`
        tokenizer: that has made the files of tokens; None: they are left out

    Raises:
        UnreadableError: the file cannot be read, or only so far.
        UserError: the template cannot be read; an id is none of the tokenizer; memory is short.
    """
    suffix, packed = format_of(file.path.name)
    template = template_of(field)
    try:
        _refuse_pointer(file.path)
        if suffix in _FILES:
            yield from _FILES[suffix](file, template, tokenizer)
            return
        with open(file.path, "rb", buffering=-1 if not packed else 0) as raw:
            stream = decompressed(raw, packed)
            yield from _TEXT[suffix](Stream(str(file.path), template, raw, stream))
    except MemoryError as error:  # of Arrow's, too: the file is no worse for it
        raise UserError(
            f"there is not the memory to read {file.path} ({error or 'MemoryError'}); use fewer "
            "--workers or more memory, and the same command goes on from what is finished"
        ) from error
    except (*DAMAGE, RecursionError, ValueError) as error:
        raise UnreadableError(*_reason(error)) from error


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
