"""Tokenizers: plain UTF-8 bytes, byte-level BPE trained on the text itself, and symbols."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlscale.errors import UserError

if TYPE_CHECKING:  # imported where it is used: the tasks of data are listed where it is missing
    import tokenizers as hf

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
"""Where Hugging Face writes which token ends a text."""
OURS = "nlscale"
"""In that file of an export: the tokenizer that its own was made of, as `save` writes it."""
END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257  # the 256 bytes and the separator
LARGEST_BPE = 1 << 24  # ids; far beyond any in use


class Tokenizer(ABC):
    """Text to token ids and back, without loss: decode(encode(text)) == text.

    Attributes:
        name: as given to `--tokenizer`
        vocabulary: number of ids; ids are 0 .. vocabulary - 1
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

    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes of text that each id stands for, [vocabulary]: none, where that is no text.

        Those of the ids of a text add up to its size; of the separator it is 0.
        """
        return np.zeros(self.vocabulary, dtype=np.int64)

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` into `directory`, for `load_tokenizer`."""

    def _checked(self, ids: ArrayLike) -> NDArray:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and not 0 <= array.min() <= array.max() < self.vocabulary:
            raise ValueError(
                f"ids run from {array.min()} to {array.max()}, the vocabulary has {self.vocabulary}"
            )
        return array[array != self.separator]


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

    def save(self, directory: str | Path) -> None:
        (Path(directory) / TOKENIZER_NAME).write_text('{"nlscale": "bytes"}\n')


class SymbolTokenizer(Tokenizer):
    """Symbols with spaces between them, of data that a program made; they are no text.

    Args:
        name: what made them, such as the name of a task.
        symbols: of each id, without spaces and each once; the last is the separator.

    Raises:
        UserError: they are fewer than 2 or more than 2^24, or not such symbols.
    """

    def __init__(self, name: str, symbols: Sequence[str]) -> None:
        if not 2 <= len(symbols) <= LARGEST_BPE:
            raise UserError(f"{len(symbols):,} symbols; give from 2 to {LARGEST_BPE:,}")
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

    def save(self, directory: str | Path) -> None:
        content = {"nlscale": "symbols", "name": self.name, "symbols": self._symbols}
        text = json.dumps(content, ensure_ascii=False)
        (Path(directory) / TOKENIZER_NAME).write_text(f"{text}\n", encoding="utf-8")

    def _id(self, word: str) -> int:
        number = self._ids.get(word, self.separator)
        if number == self.separator:
            some = " ".join(self._symbols[:5])
            raise UserError(f"{word!r} is no symbol of {self.name}; its symbols are {some} ...")
        return number


class BpeTokenizer(Tokenizer):
    """Byte-level BPE, carried by Hugging Face `tokenizers`, whose file format `save` writes.

    Args:
        carrier: the tokenizer.
        end: the token that becomes the separator.

    Raises:
        UserError: it has no such token, or ids with gaps between them.
    """

    def __init__(self, carrier: hf.Tokenizer, end: str = END_OF_TEXT) -> None:
        separator = carrier.token_to_id(end)
        if separator is None:
            raise UserError(f"the tokenizer has no {end}; train it with `nlscale data`")
        ids = carrier.get_vocab().values()
        if max(ids) >= len(ids):
            raise UserError(f"the tokenizer has {len(ids):,} ids, but one of them is {max(ids):,}")
        # A file can ask for it, and texts would lose their ends without a word.
        carrier.no_truncation()
        carrier.no_padding()
        # Otherwise a document that merely mentions <|endoftext|> would be cut in two there.
        # The saved file does not carry this setting.
        carrier.encode_special_tokens = True
        self._carrier, self._end = carrier, end
        self.separator = separator
        self.vocabulary = carrier.get_vocab_size()
        self.name = f"bpe:{self.vocabulary}"

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray]:
        encodings = self._carrier.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        if "ByteLevel" not in repr(self._carrier.decoder):
            return lengths  # pieces of characters, in which no id stands for bytes by itself
        for token, number in self._carrier.get_vocab().items():
            if number != self.separator:
                lengths[number] = len(token)  # which spells each byte as one character
        return lengths

    def decode(self, ids: ArrayLike) -> str:
        return self._carrier.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        self._carrier.save(str(Path(directory) / TOKENIZER_NAME))
        if self._end != END_OF_TEXT:
            text = json.dumps({"eos_token": self._end}, ensure_ascii=False)
            (Path(directory) / SETTINGS_NAME).write_text(f"{text}\n", encoding="utf-8")


def bpe_vocabulary(spec: str) -> int | None:
    """The vocabulary N of "bpe:N"; None for "bytes". Raises UserError for anything else."""
    if spec == "bytes":
        return None
    kind, _, size = spec.partition(":")
    if kind != "bpe" or not (size.isascii() and size.isdecimal()):
        raise UserError(
            f"unknown tokenizer {spec!r}; use bytes, bpe:N such as bpe:32000, or a "
            f"folder with a {TOKENIZER_NAME}"
        )
    if len(size) > 9 or int(size) > LARGEST_BPE:
        raise UserError(f"tokenizer {spec[:40]}: it must have at most {LARGEST_BPE:,} ids")
    if int(size) < SMALLEST_BPE:
        raise UserError(
            f"tokenizer {spec}: a byte-level BPE needs at least {SMALLEST_BPE} ids (256 bytes and "
            f"the separator); use bpe:{SMALLEST_BPE} or more, or bytes"
        )
    return int(size)


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """A byte-level BPE of exactly `vocabulary` ids, the separator included.

    Raises:
        UserError: the texts are too small to give that many ids.
    """
    import tokenizers as hf

    carrier = hf.Tokenizer(hf.models.BPE())
    carrier.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    carrier.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    carrier.train_from_iterator(texts, trainer)
    found = carrier.get_vocab_size()
    if found < vocabulary:
        raise UserError(
            f"the text gives a BPE vocabulary of only {found}, not {vocabulary}; "
            f"use bpe:{found} or more text"
        )
    return BpeTokenizer(carrier)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer saved in `directory` (a data folder, for example).

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(directory) / TOKENIZER_NAME
    try:
        text = path.read_text(encoding="utf-8")
        settings = _settings(path.with_name(SETTINGS_NAME))
        content = settings.get(OURS, json.loads(text))
        if content == {"nlscale": "bytes"}:
            return ByteTokenizer()
    except FileNotFoundError:
        raise UserError(
            f"no tokenizer at {path}; name a folder made by `nlscale data build`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}; restore or rebuild it") from None
    try:
        if isinstance(content, dict) and content.get("nlscale") == "symbols":
            return _symbols(content)
        import tokenizers as hf

        carrier = hf.Tokenizer.from_str(text)
        return BpeTokenizer(carrier, _end_of_text(carrier, settings))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except BaseException as error:  # bare Exception, and PanicException, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path}: {reason}; restore or rebuild it") from None


def _settings(path: Path) -> dict[str, Any]:
    """What a file of Hugging Face beside a tokenizer says; nothing where there is none."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} beside it is not a JSON object")
    return content


def _end_of_text(carrier: hf.Tokenizer, settings: dict[str, Any]) -> str:
    """The token that ends a text: ours where there is one, else what the file beside it says."""
    if carrier.token_to_id(END_OF_TEXT) is not None or not settings:
        return END_OF_TEXT
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if not isinstance(end, str):
        raise UserError(f"{SETTINGS_NAME} beside it names no eos_token; add it")
    return end


def _symbols(content: dict[str, object]) -> SymbolTokenizer:
    name, symbols = content.get("name"), content.get("symbols")
    if not isinstance(name, str) or not isinstance(symbols, list):
        raise UserError("it has no name or no list of symbols; build the data again")
    return SymbolTokenizer(name, symbols)
