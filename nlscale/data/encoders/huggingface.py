"""Tokenizers that Hugging Face `tokenizers` carries: of a tokenizer.json, and a trained BPE."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlscale.data.encoders.base import (
    END_OF_TEXT,
    LARGEST_VOCABULARY,
    Tokenizer,
)
from nlscale.data.spans import Spans, sizes_at, tokens_at_that_count, tokens_that_count
from nlscale.errors import UserError

if TYPE_CHECKING:  # imported where it is used: the tasks of data are listed where it is missing
    import tokenizers as hf

SEPARATOR_KEY, VOCABULARY_KEY = "nlscale_separator", "nlscale_vocabulary"
"""In tokenizer_config.json: what a build was asked for that the tokenizer.json does not say."""
BYTE_LEVEL = "ByteLevel"
"""The decoder of tokens that spell each byte as one character."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of Hugging Face `tokenizers`, whose file format `save` writes.

    A text that spells a special token does not become it. The model that cuts words may still make
    one of its spelling, where it has it in its vocabulary; such a text is cut inside the spelling.

    Args:
        carrier: the tokenizer.
        end: the token that becomes the separator.
        vocabulary: number of ids, some of which may be of no token; None: as many as tokens.

    Raises:
        UserError: it has no such token, or ids that are not below `vocabulary`.
    """

    def __init__(
        self, carrier: hf.Tokenizer, end: str = END_OF_TEXT, vocabulary: int | None = None
    ) -> None:
        import tokenizers as hf

        separator = carrier.token_to_id(end)
        if separator is None:
            raise UserError(
                f"the tokenizer has no token {end!r}; name the one that ends a text by --separator"
            )
        self.vocabulary = _vocabulary(carrier, vocabulary)
        # A file can ask for it, and texts would lose their ends without a word.
        carrier.no_truncation()
        carrier.no_padding()
        # Nor would a text have the same tokens twice, whoever reads it.
        if getattr(carrier.model, "dropout", None) is not None:
            carrier.model.dropout = None
        added = carrier.get_added_tokens_decoder()
        if separator not in added or not added[separator].special:
            carrier.add_special_tokens([hf.AddedToken(end, special=True, normalized=False)])
        # Otherwise a document that merely mentions <|endoftext|> would be cut in two there.
        # The saved file does not carry this setting.
        carrier.encode_special_tokens = True
        self._carrier, self._end = carrier, end
        self._padded = vocabulary is not None
        self.separator = separator
        content = json.loads(carrier.to_str())
        model = content["model"]
        self._of_bytes = BYTE_LEVEL in _steps(content["decoder"])
        self.name = f"{model['type'].lower()}:{carrier.get_vocab_size()}"
        specials = {n: token.content for n, token in added.items() if token.special}
        specials[separator] = end
        self._special = np.zeros(self.vocabulary, dtype=np.bool_)
        self._special[list(specials)] = True
        self._made = self._special.copy()  # those that no text may become
        if (unknown := _unknown(model)) is not None and unknown != end:
            self._made[[n for n, content in specials.items() if content == unknown]] = False
        spelled = sorted(filter(None, specials.values()), key=len, reverse=True)
        self._spelled = re.compile(f"(?={'|'.join(map(re.escape, spelled))})")

    def __reduce__(self) -> tuple[Any, ...]:
        # The carrier alone would lose the settings that its file does not carry.
        vocabulary = self.vocabulary if self._padded else None
        return type(self), (self._carrier, self._end, vocabulary)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray]:
        """Raises UserError: a text becomes the separator all the same."""
        encodings = self._carrier.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        for number, ids in enumerate(found):
            if self._made[ids].any():
                pieces = [encoding.ids for _, encoding in self._apart(texts[number])]
                found[number] = np.concatenate([np.array(p, dtype=self.dtype) for p in pieces])
                if (found[number] == self.separator).any():
                    raise UserError(
                        f"the tokenizer makes {self._end!r}, its separator, of a text such as "
                        f"{texts[number][:60]!r}; name another token with --separator"
                    )
        return found

    def _apart(self, text: str) -> Iterator[tuple[int, hf.Encoding]]:
        """The text cut inside of each special token that it spells: where each begins, and it."""
        cuts = [0, *(match.start() + 1 for match in self._spelled.finditer(text)), len(text)]
        for start, end in pairwise(cuts):
            yield start, self._carrier.encode(text[start:end], add_special_tokens=False)

    def byte_lengths(self) -> NDArray[np.int64]:
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        if not self._of_bytes:
            return lengths  # pieces of characters, in which no id stands for bytes by itself
        for token, number in self._carrier.get_vocab().items():
            lengths[number] = len(token)  # which spells each byte as one character
        for number, added in self._carrier.get_added_tokens_decoder().items():
            lengths[number] = len(added.content.encode())
        lengths[self._special] = 0
        return lengths

    def counted(self, text: str, spans: Spans, ids: NDArray) -> NDArray[np.bool_]:
        if self._lengths[ids].sum() == len(text.encode()):
            return tokens_that_count(text, spans, ids, self._lengths)
        # Ids that do not stand for bytes, or a text that the tokenizer changes before it cuts it.
        return tokens_at_that_count(len(text), spans, self._places(text))

    def sizes(self, text: str, ids: NDArray) -> NDArray[np.int64]:
        sizes = self._lengths[ids]
        if sizes.sum() == len(text.encode()):
            return sizes
        places = self._places(text)
        if len(places) == len(ids):
            return sizes_at(text, places)
        # Read as tokens, which were cut elsewhere: about the same each.
        return np.diff(len(text.encode()) * np.arange(len(ids) + 1) // max(1, len(ids)))

    def _places(self, text: str) -> list[tuple[int, int]]:
        """Characters [start, end) of a text that each of its tokens was made of, [tokens]."""
        whole = [(0, self._carrier.encode(text, add_special_tokens=False))]
        if self._made[whole[0][1].ids].any():
            whole = list(self._apart(text))
        return [(start + a, start + b) for start, piece in whole for a, b in piece.offsets]

    def decode(self, ids: ArrayLike) -> str:
        return self._carrier.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def text(self, ids: ArrayLike) -> str:
        return self._carrier.decode(self._checked(ids).tolist(), skip_special_tokens=True)

    def loses(self, ids: NDArray, text: str) -> bool:
        return super().loses(ids, text) or bool(self._special[ids].any())

    def known(self) -> NDArray[np.bool_]:
        known = np.zeros(self.vocabulary, dtype=np.bool_)
        known[list(self._carrier.get_vocab().values())] = True
        return known

    def content(self) -> dict[str, Any]:
        return json.loads(self._carrier.to_str())

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if self._end != END_OF_TEXT:
            settings = {"eos_token": self._end, SEPARATOR_KEY: self._end}
        if self._padded:
            settings[VOCABULARY_KEY] = self.vocabulary
        return settings

    def _save_content(self, path: Path) -> None:
        self._carrier.save(str(path))


def _vocabulary(carrier: hf.Tokenizer, wanted: int | None) -> int:
    """The number of ids. Raises UserError: there are others."""
    ids = carrier.get_vocab().values()
    if not ids:
        raise UserError("the tokenizer has no tokens")
    if wanted is None and max(ids) >= len(ids):
        raise UserError(
            f"the tokenizer has {len(ids):,} ids, but one of them is {max(ids):,}; accept the gaps "
            f"with --vocabulary-multiple 128"
        )
    vocabulary = len(ids) if wanted is None else wanted
    if not max(ids) < vocabulary <= LARGEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocabulary:,} ids, one of which is {max(ids):,}; it may have "
            f"{LARGEST_VOCABULARY:,}"
        )
    return vocabulary


def padded(carrier: hf.Tokenizer, multiple: int) -> int:
    """The vocabulary that holds every id and is a multiple."""
    return -(-(max(carrier.get_vocab().values(), default=0) + 1) // multiple) * multiple


def _steps(decoder: dict[str, Any] | None) -> list[str]:
    """The types of what a decoder does, one after another."""
    if decoder is None:
        return []
    inner = [_steps(step) for step in decoder.get("decoders", [])]
    return [decoder["type"], *(step for steps in inner for step in steps)]


def _unknown(model: dict[str, Any]) -> str | None:
    """The token that stands for what a model of tokens does not know."""
    number = model.get("unk_id")
    if isinstance(number, int) and number < len(model["vocab"]):
        return str(model["vocab"][number][0])
    return model.get("unk_token")


def train_bpe(
    texts: Iterable[str], vocabulary: int, multiple: int | None = None
) -> HuggingFaceTokenizer:
    """A byte-level BPE of exactly `vocabulary` ids, the separator included.

    With `multiple` as many more as make a multiple of it, which are of no token.

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
    return HuggingFaceTokenizer(carrier, vocabulary=multiple and padded(carrier, multiple))
