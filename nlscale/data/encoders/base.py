"""What a tokenizer is: text to token ids and back."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlscale.data.spans import Spans, tokens_that_count

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
"""Where Hugging Face writes which token ends a text."""
OURS = "nlscale"
"""In that file of an export: the tokenizer that its own was made of, as `save` writes it."""
END_OF_TEXT = "<|endoftext|>"
LARGEST_VOCABULARY = 1 << 24  # ids; far beyond any in use


class Tokenizer(ABC):
    """Text to token ids and back: decode(encode(text)) == text.

    One that a file describes may lose something of a text, where that is how it was made: a
    WordPiece the spaces, one without bytes the characters that it does not know.

    Attributes:
        name: as given to `--tokenizer`
        vocabulary: number of ids; ids are 0 .. vocabulary - 1, of which some may stand for nothing
        separator: the id that follows each document; `encode` never produces it
    """

    name: str
    vocabulary: int
    separator: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16, uint32 that holds every id, little-endian."""
        for name, ids in (("<u1", 1 << 8), ("<u2", 1 << 16)):
            if self.vocabulary <= ids:
                return np.dtype(name)
        return np.dtype("<u4")

    def encode(self, text: str) -> NDArray:
        """The ids of `text` as `dtype` [tokens], without a separator."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray]:
        """One array a text, as `encode` gives; BPE uses all cores."""

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """The text of `ids`, separators left out; incomplete UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """

    def text(self, ids: ArrayLike) -> str:
        """As `decode`, without the tokens that control a model and stand for no text."""
        return self.decode(ids)

    def loses(self, ids: NDArray, text: str) -> bool:
        """Whether others than these ids, which are known, may have the `text` that they have."""
        return "\ufffd" in text or (not text and len(ids) > 0)

    def known(self) -> NDArray[np.bool_]:
        """Which ids there is a token for, [vocabulary]: not the gaps, nor the padding behind."""
        return np.ones(self.vocabulary, dtype=np.bool_)

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text that each id stands for, [vocabulary]: none, where that is no text.

        Those of the ids of a text add up to its size; of the separator it is 0.
        """
        return np.zeros(self.vocabulary, dtype=np.int64)

    def counted(self, text: str, spans: Spans, ids: NDArray) -> NDArray[np.bool_]:
        """Which tokens of a text count, and the separator behind it: bool [tokens + 1].

        Args:
            text: not empty
            spans: characters of it that count
            ids: its tokens, as `encode` gives them
        """
        return tokens_that_count(text, spans, ids, self._lengths)

    def sizes(self, text: str, ids: NDArray) -> NDArray[np.int64]:
        """UTF-8 bytes of a text that each of its tokens stands for, [tokens]: its own, or as many
        as the token was made of.

        Args:
            text: of a document.
            ids: its tokens, as `encode` gives them, or as they were when it was read as tokens.
        """
        return self._lengths[ids]

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        return self.byte_lengths()

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What `tokenizer.json` says of it."""

    def identity(self) -> str:
        """A sha256 of `content`, whatever the order of its keys and the spaces in its file.

        Merges are written as "a b" by some versions of `tokenizers` and as ["a", "b"] by others,
        and reading a file changes the last digit of some scores of a Unigram: six count.
        """
        text = json.dumps(self.content())
        content = json.loads(text, parse_float=lambda score: f"{float(score):.6g}")
        model = content.get("model")
        if isinstance(model, dict) and isinstance(model.get("merges"), list):
            merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
            content = {**content, "model": {**model, "merges": merges}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """What `tokenizer_config.json` beside it has to say; there is none where it is empty."""
        return {}

    def save(self, directory: str | Path) -> None:
        """Write both into `directory`, for `nlscale.data.tokenizer.load_tokenizer`."""
        self._save_content(Path(directory) / TOKENIZER_NAME)
        if settings := self.settings():
            _write(Path(directory) / SETTINGS_NAME, settings)

    def _save_content(self, path: Path) -> None:
        _write(path, self.content())

    def _checked(self, ids: ArrayLike) -> NDArray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and not 0 <= array.min() <= array.max() < self.vocabulary:
            raise ValueError(
                f"ids run from {array.min()} to {array.max()}, the vocabulary has {self.vocabulary}"
            )
        return array[array != self.separator]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
