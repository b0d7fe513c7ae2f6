"""Tokenizers that need no file: plain UTF-8 bytes, and symbols of data that a program made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlscale.data.encoders.base import LARGEST_VOCABULARY, Tokenizer
from nlscale.errors import UserError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes. The separator is byte 0xFF, which never occurs in UTF-8."""

    name = "bytes"
    vocabulary = 256
    separator = 0xFF

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def byte_lengths(self) -> NDArray[np.int64]:
        return (np.arange(self.vocabulary) != self.separator).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def content(self) -> dict[str, Any]:
        return {"nlscale": "bytes"}


class SymbolTokenizer(Tokenizer):
    """Symbols with spaces between them, of data that a program made; they are no text.

    Args:
        name: what made them, such as the name of a task.
        symbols: of each id, without spaces and each once; the last is the separator.

    Raises:
        UserError: they are fewer than 2 or more than 2^24, or not such symbols.
    """

    def __init__(self, name: str, symbols: Sequence[str]) -> None:
        if not 2 <= len(symbols) <= LARGEST_VOCABULARY:
            raise UserError(f"{len(symbols):,} symbols; give from 2 to {LARGEST_VOCABULARY:,}")
        for symbol in symbols:
            if not isinstance(symbol, str) or symbol.split() != [symbol]:
                raise UserError(f"symbol {symbol!r} is no word; give words without spaces")
        self._symbols = list(symbols)
        self._ids = {symbol: number for number, symbol in enumerate(symbols)}
        if len(self._ids) < len(symbols):
            raise UserError("a symbol is there twice; give each once")
        self.name, self.vocabulary = name, len(symbols)
        self.separator = self.vocabulary - 1

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray]:
        """Raises UserError: a text has a word that is no symbol."""
        return [np.array([self._id(word) for word in text.split()], self.dtype) for text in texts]

    def decode(self, ids: ArrayLike) -> str:
        return " ".join(self._symbols[number] for number in self._checked(ids))

    def content(self) -> dict[str, Any]:
        return {"nlscale": "symbols", "name": self.name, "symbols": self._symbols}

    def _id(self, word: str) -> int:
        number = self._ids.get(word, self.separator)
        if number == self.separator:
            some = " ".join(self._symbols[:5])
            raise UserError(f"{word!r} is no symbol of {self.name}; its symbols are {some} ...")
        return number
