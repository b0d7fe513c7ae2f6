"""What a build is asked for beside its sources, its tokenizer and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from nlscale.data.index import (
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_BPE_SAMPLE,
    DEFAULT_FIELD,
    DEFAULT_HELD_OUT,
    DEFAULT_SHARD_TOKENS,
)
from nlscale.data.tokenizer import ByteTokenizer, bpe_vocabulary

KEEP, DROP = "keep", "drop"
"""What becomes of documents that came before."""
UNIT_BYTES = 256 << 20
"""Of the sources, in a unit: seconds to minutes of work, and so what a kill can cost."""


class Asked(TypedDict, total=False):
    """Types of what may be left out of `Options`."""

    held_out: float
    shard_tokens: int
    block_tokens: int
    seed: int
    text_field: str
    separator: str | None
    vocabulary_multiple: int | None
    bpe_sample: int
    duplicates: str
    max_lost: float | None
    pack: int | None
    unit_bytes: int


@dataclass(frozen=True)
class Options:
    """What a build was asked for.

    Fields:
        sources, tokenizer: as of `nlscale.data.build.build`
        held_out: the share of documents that goes to validation, above 0 and below 1. A document is
            held out by a hash of its text, so it stays where it is when others are added; copies of
            it go the same way. Each split gets at least one document.
        shard_tokens: the most tokens in a shard, rounded down to whole blocks
        block_tokens: tokens in a block, the unit of storage; independent of any sequence length
        seed: of the hash, so another one holds out other documents; a 64-bit integer
        text_field: the field, or the column, that holds the text of a record; or a template of
            several, such as "{title}\\n\\n{text}"
        separator: the token of a given tokenizer that ends a document; None: see
            `nlscale.data.tokenizer.read_tokenizer`
        vocabulary_multiple: the vocabulary is rounded up to a multiple of it; None: it is as large
            as the tokenizer's
        bpe_sample: the most characters that a BPE is trained on
        duplicates: "keep", or "drop": a document whose text and mask came before, in the order of
            the sources, is left out; tokens that their text does not show are compared, too
        max_lost: the share, from 0 to 1, of what the sources hold that may be lost: of the
            documents of each source, of its files, and of all bytes (those of files that are not
            read for their suffix). None: 0.01, and no file that cannot be read
        pack: documents are packed whole into samples of so many tokens, for runs of that
            `data.sequence_length` (`nlscale.data.packing`). None: they follow one another, for any
        unit_bytes: about how many bytes of the sources a unit has at most (a file is one part of a
            unit, however large). It decides where shards end: sources of one unit fill them
        by_source: whether each source has a data folder of its own, below that which is named, as
            `nlscale.data.build.build_by_source` builds them
    """

    sources: list[str]
    tokenizer: str
    held_out: float = DEFAULT_HELD_OUT
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    seed: int = 0
    text_field: str = DEFAULT_FIELD
    separator: str | None = None
    vocabulary_multiple: int | None = None
    bpe_sample: int = DEFAULT_BPE_SAMPLE
    duplicates: str = KEEP
    max_lost: float | None = None
    pack: int | None = None
    unit_bytes: int = UNIT_BYTES
    by_source: bool = False

    @property
    def shard_blocks(self) -> int:
        """Blocks in a shard, at most."""
        return self.shard_tokens // self.block_tokens

    @property
    def trains(self) -> int | None:
        """Ids of the BPE that is to be trained; None: the tokenizer is there."""
        return None if self.given else bpe_vocabulary(self.tokenizer)

    @property
    def given(self) -> bool:
        """Whether a file describes the tokenizer."""
        return self.tokenizer != ByteTokenizer.name and not self.tokenizer.startswith("bpe:")
