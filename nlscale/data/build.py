"""Building a data folder: text in, webdataset shards of token ids and an index out.

Two passes over the text. The first counts, settles which documents are held out, and gathers
the text a BPE is trained on; nothing is written before it has succeeded. The second writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nlscale.data.index import (
    BUILDING_NAME,
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_HELD_OUT,
    DEFAULT_SHARD_TOKENS,
    FORMAT,
    INDEX_NAME,
    SPLITS,
    Index,
    Skipped,
    read_index,
    write_json,
)
from nlscale.data.progress import phase, say
from nlscale.data.shards import VERIFIED_NAME, TokenShards
from nlscale.data.sources import find_files, fingerprint, read_documents
from nlscale.data.survey import Survey
from nlscale.data.tokenizer import (
    TOKENIZER_NAME,
    ByteTokenizer,
    Tokenizer,
    bpe_vocabulary,
    train_bpe,
)
from nlscale.errors import UserError

_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar")


def build(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    held_out: float = DEFAULT_HELD_OUT,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Index:
    """Tokenize `sources` into the data folder `out`, and return its index.

    Args:
        sources: files, folders, or "stdlib" (see `nlscale.data.sources.find_files`)
        tokenizer: "bytes" or "bpe:N"; the BPE is trained on a sample of the train documents
            of up to 64 Mi characters
        held_out: the share of documents that goes to validation, above 0 and below 1. A document is
            held out by a hash of its text, so it stays where it is when others are added; copies of
            it go the same way. Each split gets at least one document.
        shard_tokens: the most tokens in a shard, rounded down to whole blocks
        block_tokens: tokens in a block, the unit of storage; independent of any sequence length
        seed: of the hash, so another one holds out other documents
        overwrite: replace a build made from other sources or options
        progress: say on standard error how far it is

    When `out` was already built from the same files (names, sizes, modification times) and
    options, it is left as it is. A build that was killed is done again from the start.

    Raises:
        UserError: wrong options, unreadable sources, no or too few documents, an `out`
            that holds something else, sources that change meanwhile, and a disk that cannot be
            written.
    """
    out = Path(out)
    _check_options(held_out, shard_tokens, block_tokens)
    vocabulary = bpe_vocabulary(tokenizer)
    files = find_files(sources)
    shard_blocks = shard_tokens // block_tokens
    options = [FORMAT, tokenizer, held_out, shard_blocks, block_tokens, seed]
    identity = fingerprint(files, options)
    if not overwrite and (out / INDEX_NAME).exists():
        return _up_to_date(out, identity, progress)
    _refuse_foreign_shards(out)

    with phase("reading", sum(file.size for file in files), progress) as advance:
        survey = Survey(files, held_out, seed, sample=vocabulary is not None)
        for document in read_documents(files):
            survey.add(document)
            advance(document.consumed)
    survey.settle()
    encoder: Tokenizer = ByteTokenizer()
    if vocabulary is not None:
        if progress:
            say(f"training {tokenizer} on {len(survey.sample):,} documents")
        encoder = train_bpe(survey.sample, vocabulary)
        survey.sample.clear()
    # Here, not at the top: it imports torch, and finding the data up to date should be quick.
    from nlscale.data.writer import DataWriter

    try:
        _clear(out)
        encoder.save(out)
        with phase("tokenizing", survey.bytes, progress) as advance:
            written = DataWriter(out, encoder, shard_blocks, block_tokens)
            for document in survey.again():
                written.add(document.text, document.data, survey.split(document.data))
                advance(len(document.data))
            written.close()
        index = Index(
            format=FORMAT,
            fingerprint=identity,
            sources=list(sources),
            tokenizer=encoder.name,
            vocabulary=encoder.vocabulary,
            separator=encoder.separator,
            dtype=encoder.dtype.name,
            block_tokens=block_tokens,
            splits=written.splits(),
            skipped=Skipped(count=survey.skipped_count, first=survey.skipped),
            empty_documents=survey.empty,
            unigram_bits_per_byte=written.unigram_bits_per_byte(),
        )
        write_json(out / INDEX_NAME, index)
        (out / BUILDING_NAME).unlink()
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error}; make room or choose another --out, and build again"
        ) from error
    return index


def _check_options(held_out: float, shard_tokens: int, block_tokens: int) -> None:
    if not 0.0 < held_out < 1.0:
        raise UserError(f"held-out share is {held_out}; it must be above 0 and below 1")
    if block_tokens < 1:
        raise UserError(f"block tokens is {block_tokens}; it must be at least 1")
    if shard_tokens < block_tokens:
        raise UserError(
            f"shard tokens is {shard_tokens:,}, less than one block of {block_tokens:,}; "
            f"use --shard-tokens {block_tokens} or more"
        )


def _up_to_date(out: Path, identity: str, progress: bool) -> Index:
    index = read_index(out)
    if index["fingerprint"] != identity:
        raise UserError(
            f"{out} was built from other sources or options ({' '.join(index['sources'])}, "
            f"{index['tokenizer']}); choose another --out, or replace it with --overwrite"
        )
    for split in index["splits"]:
        TokenShards(out, split, verify=False)  # says so when a shard is missing
    if progress:
        say(f"{out} is up to date")
    return index


def _shard_paths(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    return sorted(path for path in out.iterdir() if _SHARD_NAME.fullmatch(path.name))


def _refuse_foreign_shards(out: Path) -> None:
    ours = (out / INDEX_NAME).exists() or (out / BUILDING_NAME).exists()
    paths = _shard_paths(out)
    if paths and not ours:
        raise UserError(
            f"{out} holds {paths[0].name}, which no build left there; choose another --out"
        )


def _clear(out: Path) -> None:
    """Mark `out` as being built, then remove what an earlier build left, its index first."""
    out.mkdir(parents=True, exist_ok=True)
    (out / BUILDING_NAME).touch()
    for name in (INDEX_NAME, VERIFIED_NAME, TOKENIZER_NAME):
        (out / name).unlink(missing_ok=True)
    for path in (*_shard_paths(out), *out.glob(".*.json.*.tmp")):
        path.unlink()
