"""The index of a built data folder: what `index.json` holds, and reading and writing it.

A data folder is

    index.json              written last: a folder without it is not a finished build
    tokenizer.json          see `nlscale.data.tokenizer`
    train-000000.tar ...    webdataset shards, one block of token ids a member; with masks, one
                            sample of two members: the mask of the block before its ids
    validation-000000.tar
    .units/                 only while it is built: see `nlscale.data.building`
    .verified.json          which shards are known to be whole (see `nlscale.data.verified`)
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, TypedDict, cast

from nlscale.config.urls import Location, inside, is_url
from nlscale.data.index_form import IndexFormError, check
from nlscale.data.remote.service import Missing, Patience, read_small
from nlscale.errors import UserError

FORMAT = 1
MASKED_FORMAT = 2  # which versions that do not know masks refuse, instead of training on all tokens
INDEX_NAME = "index.json"
BUILDING_NAME = ".building"  # present while a build writes; left behind by one that was killed
UNITS_NAME = ".units"  # what a build has of each part, while it is not finished
SPLITS = ("train", "validation")
DEFAULT_FIELD = "text"  # of a record, that holds its text
DEFAULT_HELD_OUT = 0.01
DEFAULT_SHARD_TOKENS = 1 << 26
DEFAULT_BLOCK_TOKENS = 8192
DEFAULT_BPE_SAMPLE = 64 << 20  # characters
TAR_RECORD = 512  # a tar header is one record, and data is padded to whole records


class _Shard(TypedDict):
    name: str
    tokens: int
    blocks: int
    size_bytes: int
    sha256: str
    offset: int
    stride: int


class Shard(_Shard, total=False):
    """One tar file. The data of its block i begins at byte `offset + i * stride`.

    All blocks hold `Index.block_tokens` ids, except the last of a shard, which may be shorter
    where a unit of the build ends (see `nlscale.data.building`), as at the end of the split;
    two numbers therefore locate every block, and the index stays small for any corpus.

    With masks, in format 2, that of block i begins at byte `mask_offset + i * stride`: a bit a
    token, the first in the lowest bit of a byte; for a whole block, also where its ids are fewer.
    """

    mask_offset: int


class SourceCounts(TypedDict):
    """What of a split came from one of the sources; figures as those of `Split`.

    Files that were named one by one are one source.
    """

    source: str
    documents: int
    tokens: int
    bytes: int


class _Split(TypedDict):
    documents: int
    tokens: int
    bytes: int
    shards: list[Shard]


class Split(_Split, total=False):
    """One split: `bytes` counts UTF-8 bytes of text, `tokens` includes one separator a document.

    With masks, in format 2, `counted_tokens` are those of the tokens that count as targets, and
    `counted_bytes` the bytes of text that these stand for. `sources` has a part for each source, in
    their order; they add up to the whole, but for the tokens that fill packed samples up. It is not
    in indexes that earlier versions wrote, nor in those of a task.
    """

    counted_tokens: int
    counted_bytes: int
    sources: list[SourceCounts]


class SkippedDocument(TypedDict):
    """A document that could not be read, and why."""

    document: str
    reason: str


class _Skipped(TypedDict):
    count: int
    first: list[SkippedDocument]


class Skipped(_Skipped, total=False):
    """How many documents could not be read, the first few of them, and how many for which reason.

    Not those of `LostFiles`.
    """

    reasons: dict[str, int]


class LostFile(TypedDict):
    """A file that could not be read, or not to its end, and why."""

    file: str
    reason: str


class LostFiles(TypedDict):
    """How many files `of` how many could not be read, the first few, and how many for what."""

    count: int
    of: int
    first: list[LostFile]
    reasons: dict[str, int]


class LeftOut(TypedDict):
    """What lies in the folders and is not to be read, of one kind: a suffix, hidden, empty ...

    `bytes` counts what could have been text, `first` names some.
    """

    reason: str
    count: int
    bytes: int
    first: list[str]


class Duplicates(TypedDict):
    """Documents dropped because the same text, with the same mask, came before.

    How many, their UTF-8 bytes, and how many of them `reasons` says where the first one lies.
    """

    count: int
    bytes: int
    reasons: dict[str, int]


class TaskIndex(TypedDict):
    """What a program made (`nlscale.data.tasks`), where the data are no text.

    `task` is its text with every argument, `about` what it asks; each of the documents is an
    example of `length` tokens, drawn with `seed`. `repeated` counts the examples of each split that
    had come before in it; none is in both.
    """

    task: str
    about: str
    length: int
    seed: int
    repeated: dict[str, int]


class PackedIndex(TypedDict):
    """Of data whose documents were packed into samples (`nlscale.data.packing`), in format 2.

    Sample i of a split is its tokens [i * length, (i + 1) * length), and no target of it lies in
    the next. `window` is the packer's, in tokens; by split, `cut` counts the documents of more than
    `length` tokens, `unended` those that have no separator, as a sample ends with their text, and
    `padding` the tokens that fill samples up.
    """

    length: int
    window: int
    cut: dict[str, int]
    unended: dict[str, int]
    padding: dict[str, int]


class _Index(TypedDict):
    format: int
    fingerprint: str
    sources: list[str]
    tokenizer: str
    vocabulary: int
    separator: int
    dtype: str
    block_tokens: int
    splits: dict[str, Split]
    skipped: Skipped
    empty_documents: int
    unigram_bits_per_byte: float | None


class Index(_Index, total=False):
    """The content of `index.json`.

    `dtype` is uint8, uint16 or uint32, little-endian on disk. `unigram_bits_per_byte` is the
    cross-entropy of the validation tokens under the add-one smoothed unigram distribution of
    the train tokens, in bits per UTF-8 byte of validation text: what a model that learns
    nothing but frequencies would reach; with masks, of the tokens that count; None where those of
    validation stand for no text. `empty_documents` counts documents without a character, or token,
    which are left out. `text_field` is what the text of a record was called, or its template; it,
    `lost_files` and `left_out` are not in indexes that earlier versions wrote, nor in those of a
    `task`. Nor is `tokenizer_sha256`, which tells tokenizers apart that have the same name
    (`nlscale.data.tokenizer.Tokenizer.identity`).
    `duplicates` is there where they were dropped, `packed` where documents were packed.
    """

    text_field: str
    lost_files: LostFiles
    left_out: list[LeftOut]
    tokenizer_sha256: str
    duplicates: Duplicates
    packed: PackedIndex
    task: TaskIndex


def read_index(directory: Location, patience: Patience | None = None) -> Index:
    """The index of a data folder.

    Args:
        directory: of the data, or its URL.
        patience: with a service.

    Raises:
        UserError: there is no finished build there, one of another format, or an index that says
            what cannot be, such as the name of a file elsewhere.
    """
    path = inside(directory, INDEX_NAME)
    again = (
        "copy the folder there again" if is_url(directory) else "build it again with --overwrite"
    )
    try:
        index = read_small(directory, INDEX_NAME, patience)
    except Missing:
        raise UserError(
            f"no data at {directory}: there is no {INDEX_NAME}; build it in a folder of this "
            f"machine, with nlscale data build, and copy that there whole"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        if any((Path(directory) / name).exists() for name in (BUILDING_NAME, UNITS_NAME)):
            raise UserError(
                f"the data at {directory} was never finished (no {INDEX_NAME}); "
                "run the same `nlscale data build` again"
            ) from None
        if inside_it := sorted(path.parent for path in Path(directory).glob(f"*/{INDEX_NAME}")):
            raise UserError(
                f"no data at {directory}, but in folders of it: name one of them, such as "
                f"{inside_it[0]}, or mix them (data.mixture)"
            ) from None
        raise UserError(
            f"no data at {directory}; build it with: "
            f"nlscale data build --source PATH --tokenizer bytes --out {directory}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; {again}") from None
    found = index.get("format") if isinstance(index, dict) else None
    if type(found) is not int or found not in (FORMAT, MASKED_FORMAT):
        said = found if type(found) is int else f"a {type(found).__name__}"
        raise UserError(
            f"{path} has format {said}, this version reads formats {FORMAT} and {MASKED_FORMAT}; "
            f"{again}"
        )
    try:
        check(index, masked=found == MASKED_FORMAT)
    except IndexFormError as error:
        raise UserError(f"{path} cannot be used: {error}; restore it, or {again}") from None
    return cast(Index, index)


def tokenizer_of(index: Index) -> str | None:
    """The name and the sha256 of its tokenizer; None: an earlier version wrote the index."""
    digest = index.get("tokenizer_sha256")
    return None if digest is None else f"{index['tokenizer']} sha256:{digest}"


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that a reader sees the old file or the whole new one, never part.

    Raises:
        OSError: the folder cannot be written.
    """
    # Not tempfile: its files are private to the user, and data folders are shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
