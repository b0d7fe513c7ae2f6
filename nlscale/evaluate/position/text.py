"""The tokens that a loss is taken of: held-out text of a data folder, or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nlscale.config.urls import Location
from nlscale.data import TokenShards
from nlscale.data.documents import SourceFile, UnreadableError, format_of, read_documents
from nlscale.data.tally import shown
from nlscale.data.tokenizer import Tokenizer, load_tokenizer
from nlscale.errors import UserError
from nlscale.evaluate.asking.tokenizer import tokenizer_of
from nlscale.generate.given import data_of, tokenizer_for
from nlscale.generate.model import Model


@dataclass(frozen=True)
class Text:
    """Documents, one after the other, each with a separator behind it."""

    label: str
    tokens: int
    read: Callable[[int, int], NDArray[np.int64]]
    """So many ids from a place on."""
    read_mask: Callable[[int, int], NDArray[np.bool_] | None]
    """Which of these count as targets; None: all."""
    bytes: NDArray[np.int64]
    """UTF-8 bytes that each id stands for, [vocabulary]; zeros where they are no text."""


def text_of(
    model: Model, data: Path | None, file: Path | None, tokenizer_file: Path | None = None
) -> Text:
    """The text of a question.

    Args:
        model: whose tokenizer reads it.
        data: a data folder, whose held-out split it is; None: that of the model's run.
        file: a file, instead.
        tokenizer_file: of `--tokenizer`, which the model reads with from now on.

    Raises:
        UserError: it cannot be read, or was not made by the model's tokenizer.
    """
    if file is not None:
        return _of_file(file, tokenizer_of(model, tokenizer_file))
    if tokenizer_file is not None:
        tokenizer_for(model, tokenizer_file)
    folder = data or data_of(model.config, "name text with --data or --text")
    try:
        shards = TokenShards(folder, "validation", cache=model.config.data.cache)
    except UserError as error:
        if data is not None:
            raise
        raise UserError(f"{error}; or name text with --data or --text") from None
    tokenizer = load_tokenizer(folder)
    _check(model, tokenizer, folder)
    label, size = f"held-out text of {folder}", tokenizer.byte_lengths()
    return Text(label, shards.tokens, shards.read, shards.read_mask, size)


def _check(model: Model, tokenizer: Tokenizer, folder: Location) -> None:
    """Refuse ids that are not those of the model; one without a tokenizer takes that of the data.

    Raises:
        UserError: they are not.
    """
    try:
        own = model.tokenizer
    except UserError:
        model.tokenizer = tokenizer  # refuses one of more ids
        return
    same = own.name == tokenizer.name
    if not same or not np.array_equal(own.byte_lengths(), tokenizer.byte_lengths()):
        raise UserError(
            f"{folder} holds ids of {tokenizer.name}, and the model was trained on others, of "
            f"{own.name}; give the text itself with --text"
        )


def _of_file(file: Path, tokenizer: Tokenizer) -> Text:
    pieces: list[NDArray] = []
    end = np.array([tokenizer.separator], dtype=np.int64)
    for text in _documents(file):
        pieces += [tokenizer.encode(text).astype(np.int64), end]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    return Text(
        str(file),
        len(ids),
        lambda first, count: ids[first : first + count],
        lambda first, count: None,
        tokenizer.byte_lengths(),
    )


def _documents(file: Path) -> Iterator[str]:
    """The documents of a file; of one whose suffix says nothing, the whole of it."""
    try:
        if not file.is_file():
            raise UserError(f"no file {file}; name one of text, or a data folder with --data")
        if not format_of(file.name)[0]:
            yield file.read_bytes().decode("utf-8")
            return
        for document in read_documents(SourceFile(file, file.name, file.stat().st_size, 0)):
            if document.error:
                raise UserError(f"{shown(document.name)}: {document.error}; mend or remove it")
            yield document.text
    except UnreadableError as error:
        raise UserError(f"cannot read {file}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text: not UTF-8, at byte {error.start:,}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
