"""Building a data folder: text in, webdataset shards of token ids and an index out.

Two passes over the text. The first counts, settles which documents are held out, and gathers
the text a BPE is trained on; nothing is written before it has succeeded. The second writes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from nlscale.data.index import (
    BUILDING_NAME,
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_FIELD,
    DEFAULT_HELD_OUT,
    DEFAULT_SHARD_TOKENS,
    FORMAT,
    INDEX_NAME,
    SPLITS,
    Index,
    read_index,
    write_json,
)
from nlscale.data.losses import Losses
from nlscale.data.progress import phase, say
from nlscale.data.shards import TokenShards
from nlscale.data.sources import Found, find_files, fingerprint
from nlscale.data.survey import Survey
from nlscale.data.tally import shown
from nlscale.data.tokenizer import (
    SETTINGS_NAME,
    TOKENIZER_NAME,
    ByteTokenizer,
    Tokenizer,
    bpe_vocabulary,
    load_tokenizer,
    train_bpe,
)
from nlscale.data.verified import VERIFIED_NAME, remember, state_of
from nlscale.errors import UserError

_MOST_BLOCK = 1 << 27  # tokens; a block is held in memory
_MOST_SHARD = 1 << 40  # tokens: some TiB
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
    text_field: str = DEFAULT_FIELD,
    max_lost: float | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Index:
    """Tokenize `sources` into the data folder `out`, and return its index.

    Args:
        sources: files, folders, or "stdlib" (see `nlscale.data.sources.find_files`)
        tokenizer: "bytes"; "bpe:N", which is trained on a sample of the train documents of up to
            64 Mi characters; or a folder with the tokenizer.json of another model, or of other data
        held_out: the share of documents that goes to validation, above 0 and below 1. A document is
            held out by a hash of its text, so it stays where it is when others are added; copies of
            it go the same way. Each split gets at least one document.
        shard_tokens: the most tokens in a shard, rounded down to whole blocks
        block_tokens: tokens in a block, the unit of storage; independent of any sequence length
        seed: of the hash, so another one holds out other documents; a 64-bit integer
        text_field: the field, or the column, that holds the text of a record
        max_lost: the share, from 0 to 1, of what the sources hold that may be lost: of the
            documents of each source, of its files, and of all bytes (those of files that are not
            read for their suffix). None: 0.01, and no file that cannot be read
        overwrite: replace a build made from other sources or options
        progress: say on standard error how far it is

    When `out` was already built from the same files (names, sizes, modification times) and
    options, it is left as it is. A build that was killed is done again from the start.

    Raises:
        UserError: wrong options, unreadable sources, no or too few documents, more of them lost
            than `max_lost`, an `out` that holds something else, sources that change meanwhile, and
            a disk that cannot be written.
    """
    out = Path(out)
    check_options(held_out, shard_tokens, block_tokens, seed, max_lost, text_field)
    named = tokenizer == "bytes" or tokenizer.startswith("bpe:")
    given = load_tokenizer(tokenizer) if not named and Path(tokenizer).is_dir() else None
    vocabulary = None if given else bpe_vocabulary(tokenizer)
    found = find_files(sources, out)
    shard_blocks = shard_tokens // block_tokens
    options: list[object] = [FORMAT, tokenizer, held_out, shard_blocks, block_tokens, seed]
    if text_field != DEFAULT_FIELD:  # which builds of earlier versions do not name
        options.append(text_field)
    if given is not None:  # what it is, wherever it lies
        options[1] = hashlib.sha256((Path(tokenizer) / TOKENIZER_NAME).read_bytes()).hexdigest()
    identity = fingerprint(found.files, options)
    if not overwrite and (out / INDEX_NAME).exists():
        return _up_to_date(out, identity, found, max_lost, progress)
    refuse_foreign_shards(out)
    Losses(found, text_field).check_left_out(max_lost)  # before hours of reading

    with phase("reading", found.bytes, progress) as advance:
        survey = Survey(found, text_field, held_out, seed, sample=vocabulary is not None)
        survey.read(advance)
    survey.losses.check(max_lost)
    survey.settle()
    encoder: Tokenizer = given or ByteTokenizer()
    if vocabulary is not None:
        if progress:
            say(f"training {tokenizer} on {len(survey.sample):,} documents")
        encoder = train_bpe(survey.sample, vocabulary)
        survey.sample.clear()
    # Here, not at the top: it imports torch, and finding the data up to date should be quick.
    from nlscale.data.writer import DataWriter

    try:
        clear(out)
        encoder.save(out)
        with phase("tokenizing", survey.bytes, progress) as advance:
            written = DataWriter(out, encoder, shard_blocks, block_tokens, survey.masked)
            for document in survey.again():
                split = survey.split(document.data)
                written.add(document.text, document.data, split, document.spans)
                advance(len(document.data))
            written.close()
        index = Index(
            format=written.format,
            fingerprint=identity,
            sources=list(sources),
            tokenizer=encoder.name,
            vocabulary=encoder.vocabulary,
            separator=encoder.separator,
            dtype=encoder.dtype.name,
            block_tokens=block_tokens,
            splits=written.splits(),
            skipped=survey.losses.skipped(),
            lost_files=survey.losses.lost_files(),
            left_out=survey.losses.left_out(),
            text_field=text_field,
            empty_documents=survey.empty,
            unigram_bits_per_byte=written.unigram_bits_per_byte(),
        )
        finish(out, index)
    except OSError as error:
        raise unwritable(out, error) from error
    return index


def check_options(
    held_out: float,
    shard_tokens: int,
    block_tokens: int,
    seed: int,
    max_lost: float | None = None,
    text_field: str = DEFAULT_FIELD,
) -> None:
    """Refuse options that cannot be, by a UserError; see `build`."""
    if not 0.0 < held_out < 1.0:
        raise UserError(f"held-out share is {held_out}; it must be above 0 and below 1")
    if max_lost is not None and not 0.0 <= max_lost <= 1.0:
        raise UserError(f"max-lost share is {max_lost}; it must be from 0 to 1")
    if not text_field:
        raise UserError("the text field has no name; leave it out for 'text'")
    if not -(1 << 63) <= seed < 1 << 64:
        raise UserError(f"seed is {seed}; it must be an integer of 64 bits")
    if not 1 <= block_tokens <= _MOST_BLOCK:
        raise UserError(f"block tokens is {block_tokens}; it must be from 1 to {_MOST_BLOCK:,}")
    if shard_tokens < block_tokens:
        raise UserError(
            f"shard tokens is {shard_tokens:,}, less than one block of {block_tokens:,}; "
            f"use --shard-tokens {block_tokens} or more"
        )
    if shard_tokens > _MOST_SHARD:
        raise UserError(f"shard tokens is {shard_tokens:,}; it must be at most {_MOST_SHARD:,}")


def _up_to_date(
    out: Path, identity: str, found: Found, max_lost: float | None, progress: bool
) -> Index:
    index = read_index(out)
    if index["fingerprint"] != identity:
        fewer = "" if "left_out" in index else ", by a version that read fewer formats"
        named = shown(" ".join(index["sources"]))
        raise UserError(
            f"{out} was built from other sources or options ({named}, "
            f"{shown(index['tokenizer'])}){fewer}; choose another --out, or replace it with "
            "--overwrite"
        )
    for split in index["splits"]:
        TokenShards(out, split, verify=False)  # says so when a shard is missing
    losses = Losses(found, index.get("text_field", DEFAULT_FIELD))
    if "left_out" in index:
        losses.check_left_out(max_lost)
    elif found.left_bytes:  # of a version that did not count it: nothing is built anew for it
        say(f"not in {out}: {found.left_out.words()}")
    if progress:
        say(f"{out} is up to date")
    return index


def _shard_paths(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    return sorted(path for path in out.iterdir() if _SHARD_NAME.fullmatch(path.name))


def refuse_foreign_shards(out: Path) -> None:
    """A UserError where a folder holds shards that no build has left there."""
    ours = (out / INDEX_NAME).exists() or (out / BUILDING_NAME).exists()
    paths = _shard_paths(out)
    if paths and not ours:
        raise UserError(
            f"{out} holds {paths[0].name}, which no build left there; choose another --out"
        )


def clear(out: Path) -> None:
    """Mark `out` as being built, then remove what an earlier build left, its index first."""
    out.mkdir(parents=True, exist_ok=True)
    (out / BUILDING_NAME).touch()
    for name in (INDEX_NAME, VERIFIED_NAME, TOKENIZER_NAME, SETTINGS_NAME):
        (out / name).unlink(missing_ok=True)
    for path in (*_shard_paths(out), *out.glob(".*.json.*.tmp")):
        path.unlink()


def finish(out: Path, index: Index) -> None:
    """Write the index of a folder whose shards are written: it is built. Raises OSError."""
    # Hashed while they were written, so that no start of a run has to read them for it.
    remember(
        out,
        {
            shard["name"]: state_of(out, shard)
            for split in index["splits"].values()
            for shard in split["shards"]
        },
    )
    write_json(out / INDEX_NAME, index)
    (out / BUILDING_NAME).unlink()


def unwritable(out: Path, error: OSError) -> UserError:
    """What is said where the disk does not take what is built."""
    return UserError(
        f"cannot write {out}: {error}; make room or choose another --out, and build again"
    )
