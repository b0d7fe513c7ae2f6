"""Whether what a build is asked for can be, and what of it the fingerprint of the build has."""

from __future__ import annotations

import hashlib

from nlscale.data.building.options import DROP, KEEP, UNIT_BYTES, Options
from nlscale.data.documents import template_of
from nlscale.data.index import DEFAULT_BPE_SAMPLE, DEFAULT_FIELD, FORMAT
from nlscale.data.packing import MOST_WINDOW_TOKENS, window_of
from nlscale.data.tokenizer import (
    ByteTokenizer,
    bpe_vocabulary,
    decided_beside,
    given_file,
    read_tokenizer,
    refuse_options,
)
from nlscale.errors import UserError

_MOST_BLOCK = 1 << 27  # tokens; a block is held in memory
_MOST_SHARD = 1 << 40  # tokens: some TiB


def check(options: Options) -> None:
    """Refuse options that cannot be, and a tokenizer that there is not, by a UserError."""
    check_options(
        options.held_out,
        options.shard_tokens,
        options.block_tokens,
        options.seed,
        options.max_lost,
        options.text_field,
    )
    if options.duplicates not in (KEEP, DROP):
        raise UserError(f"duplicates is {options.duplicates!r}; it must be {KEEP} or {DROP}")
    if options.pack is not None and not 2 <= options.pack <= MOST_WINDOW_TOKENS:
        raise UserError(
            f"pack is {options.pack}; it must be from 2 to {MOST_WINDOW_TOKENS:,} tokens"
        )
    if options.unit_bytes < 1:
        raise UserError(f"unit bytes is {options.unit_bytes}; it must be 1 or more")
    tokenizer, path = options.tokenizer, given_file(options.tokenizer)
    chosen, trains = (options.separator, options.vocabulary_multiple), False
    if path is not None:
        read_tokenizer(path, *chosen)  # which is refused before anything is read
    else:
        trains = bpe_vocabulary(tokenizer) is not None
        refuse_options(tokenizer, *chosen, None if trains else ByteTokenizer.vocabulary)
    if not trains and options.bpe_sample != DEFAULT_BPE_SAMPLE:
        raise UserError(f"--bpe-sample is for bpe:N, and --tokenizer is {tokenizer}; leave it out")


def asked_of(options: Options) -> list[object]:
    """What the fingerprint of a build has beside the files."""
    tokenizer, path = options.tokenizer, given_file(options.tokenizer)
    if path is not None:  # what it is, wherever it lies
        tokenizer = hashlib.sha256(path.read_bytes()).hexdigest()
    asked: list[object] = [FORMAT, tokenizer, options.held_out, options.shard_blocks]
    asked += [options.block_tokens, options.seed]
    # Builds of earlier versions do not name these.
    if options.text_field != DEFAULT_FIELD:
        asked.append(options.text_field)
    chosen = {
        "separator": options.separator,
        "vocabulary_multiple": options.vocabulary_multiple,
        "bpe_sample": None if options.bpe_sample == DEFAULT_BPE_SAMPLE else options.bpe_sample,
    }
    asked += [{name: value} for name, value in chosen.items() if value is not None]
    if options.duplicates != KEEP:
        asked.append({"duplicates": options.duplicates})
    if options.pack is not None:
        asked.append({"pack": options.pack, "window": window_of(options.pack)})
    if options.unit_bytes != UNIT_BYTES:
        asked.append({"unit_bytes": options.unit_bytes})
    if options.by_source:
        asked.append("by source")
    return asked


def beside_of(options: Options) -> dict[str, object]:
    """What the file beside a tokenizer.json decides of the index; nothing where it does not."""
    path, chosen = given_file(options.tokenizer), (options.separator, options.vocabulary_multiple)
    if path is None:
        return {}
    tokenizer = read_tokenizer(path, *chosen)
    if not decided_beside(path, tokenizer, *chosen):
        return {}
    return {
        "separator": tokenizer.separator,
        "vocabulary": tokenizer.vocabulary,
        "tokenizer_sha256": tokenizer.identity(),
    }


def check_options(
    held_out: float,
    shard_tokens: int,
    block_tokens: int,
    seed: int,
    max_lost: float | None = None,
    text_field: str = DEFAULT_FIELD,
) -> None:
    """Refuse options that cannot be, by a UserError; see `nlscale.data.build.build`."""
    if not 0.0 < held_out < 1.0:
        raise UserError(f"held-out share is {held_out}; it must be above 0 and below 1")
    if max_lost is not None and not 0.0 <= max_lost <= 1.0:
        raise UserError(f"max-lost share is {max_lost}; it must be from 0 to 1")
    if not text_field:
        raise UserError("the text field has no name; leave it out for 'text'")
    template_of(text_field)  # refuses one that cannot be read
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
