"""Building a data folder: text in, webdataset shards of token ids and an index out.

Two passes over the text, each over units of it that processes share (`nlscale.data.building`). The
first counts, settles which documents are held out, and gathers the text a BPE is trained on;
nothing of an earlier build is removed before it has succeeded. The second writes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nlscale.data.building import passes
from nlscale.data.building.units import (
    DROP,
    KEEP,
    UNIT_BYTES,
    Options,
    any_plan,
    first_change,
    read_plan,
    write_plan,
)
from nlscale.data.building.work import INDEX, SETTLED, Changed, Work, kept
from nlscale.data.documents import template_of
from nlscale.data.folder import refuse_foreign_shards, remove_temporary, unwritable
from nlscale.data.index import (
    BUILDING_NAME,
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_BPE_SAMPLE,
    DEFAULT_FIELD,
    DEFAULT_HELD_OUT,
    DEFAULT_SHARD_TOKENS,
    FORMAT,
    INDEX_NAME,
    Index,
    read_index,
)
from nlscale.data.losses import Losses
from nlscale.data.packing import MOST_WINDOW_TOKENS, window_of
from nlscale.data.progress import say
from nlscale.data.shards import TokenShards
from nlscale.data.sources import Found, find_files, fingerprint
from nlscale.data.tally import shown
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
    separator: str | None = None,
    vocabulary_multiple: int | None = None,
    bpe_sample: int = DEFAULT_BPE_SAMPLE,
    duplicates: str = KEEP,
    max_lost: float | None = None,
    pack: int | None = None,
    overwrite: bool = False,
    workers: int = 1,
    unit_bytes: int = UNIT_BYTES,
    progress: bool = False,
) -> Index:
    """Tokenize `sources` into the data folder `out`, and return its index.

    Args:
        sources: files, folders, or "stdlib" (see `nlscale.data.sources.find_files`)
        tokenizer: "bytes"; "bpe:N", which is trained on a sample of the train documents;
            "file:PATH/tokenizer.json", of another model or of other data; or a folder with one.
            Only with the last two are sources read that are tokens already
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
            the sources, is left out; of sources of tokens, whose ids did
        max_lost: the share, from 0 to 1, of what the sources hold that may be lost: of the
            documents of each source, of its files, and of all bytes (those of files that are not
            read for their suffix). None: 0.01, and no file that cannot be read
        pack: documents are packed whole into samples of so many tokens, for runs of that
            `data.sequence_length` (`nlscale.data.packing`). None: they follow one another, for any
        overwrite: replace a build made from other sources or options
        workers: processes that share the units; what they build does not depend on how many
        unit_bytes: about how many bytes of the sources a unit has at most (a file is one part of a
            unit, however large). It decides where shards end: sources of one unit fill them
        progress: say on standard error how far it is

    When `out` was already built from the same files (names, sizes, modification times) and
    options, it is left as it is. A build that was killed goes on with the units that it had not
    finished; those that it had are compared with their checksums.

    Raises:
        UserError: wrong options, unreadable sources, no or too few documents, more of them lost
            than `max_lost`, an `out` that holds something else, sources that change meanwhile, and
            a disk that cannot be written.
        LostRank: a process was killed.
    """
    work = begun(
        sources,
        tokenizer,
        out,
        held_out=held_out,
        shard_tokens=shard_tokens,
        block_tokens=block_tokens,
        seed=seed,
        text_field=text_field,
        separator=separator,
        vocabulary_multiple=vocabulary_multiple,
        bpe_sample=bpe_sample,
        duplicates=duplicates,
        max_lost=max_lost,
        pack=pack,
        overwrite=overwrite,
        unit_bytes=unit_bytes,
        progress=progress,
    )
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be 1 or more")
    if not isinstance(work, Work):
        return work
    with kept(work), _nothing_left(work):
        return passes.run_all(work, workers, progress)


def begun(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    held_out: float = DEFAULT_HELD_OUT,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    seed: int = 0,
    text_field: str = DEFAULT_FIELD,
    separator: str | None = None,
    vocabulary_multiple: int | None = None,
    bpe_sample: int = DEFAULT_BPE_SAMPLE,
    duplicates: str = KEEP,
    max_lost: float | None = None,
    pack: int | None = None,
    overwrite: bool = False,
    unit_bytes: int = UNIT_BYTES,
    progress: bool = False,
) -> Work | Index:
    """What `build` does before any text is read: what is to be built, or the index that is there.

    What an earlier attempt has made of the same is kept. Arguments are those of `build`.

    Raises:
        UserError: as `build`, of what is known before the text is read.
    """
    out = Path(out)
    check_options(held_out, shard_tokens, block_tokens, seed, max_lost, text_field)
    if duplicates not in (KEEP, DROP):
        raise UserError(f"duplicates is {duplicates!r}; it must be {KEEP} or {DROP}")
    if pack is not None and not 2 <= pack <= MOST_WINDOW_TOKENS:
        raise UserError(f"pack is {pack}; it must be from 2 to {MOST_WINDOW_TOKENS:,} tokens")
    if unit_bytes < 1:
        raise UserError(f"unit bytes is {unit_bytes}; it must be 1 or more")
    options = Options(
        sources=list(sources),
        tokenizer=tokenizer,
        trains=_vocabulary(tokenizer, separator, vocabulary_multiple, bpe_sample),
        held_out=held_out,
        shard_blocks=shard_tokens // block_tokens,
        block_tokens=block_tokens,
        seed=seed,
        text_field=text_field,
        separator=separator,
        vocabulary_multiple=vocabulary_multiple,
        bpe_sample=bpe_sample,
        duplicates=duplicates,
        max_lost=max_lost,
        pack=pack,
    )
    found = find_files(sources, out)
    asked, beside = _asked(options, unit_bytes), _beside(options)
    identities = [fingerprint(found.files, [*asked, beside] if beside else asked)]
    identity = identities[0]
    there = (out / INDEX_NAME).exists()
    if not overwrite and there:
        index = read_index(out)
        if beside and beside.items() <= index.items():  # builds of earlier versions do not name it
            identities.append(fingerprint(found.files, asked))
        return _up_to_date(out, index, identities, found, max_lost, progress)
    refuse_foreign_shards(out)
    Losses(found, text_field).check_left_out(max_lost)  # before hours of reading
    work, only_options = Work(out), fingerprint([], [*asked, beside])
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = read_plan(work.folder)
        if before is None and any_plan(work.folder) and progress:
            say(
                f"starting over what an earlier build of {out} had begun: its plan is damaged, "
                "or of another version"
            )
        if before is not None and before.identity != identity and progress:
            changed = "it had other options"
            if before.asked == only_options:
                changed = f"{first_change(work.folder, found.files)} has changed since"
            say(f"starting over what an earlier build of {out} had begun: {changed}")
        # The index goes before anything is settled: what has both is the rest of a finished build.
        left = there and work.noted(SETTLED) is not None
        if before is None or before.identity != identity or left:
            work.discard()
        work.folder.mkdir(exist_ok=True)
        work.tidy()
        remove_temporary(out)
        if (path := given_file(tokenizer)) is not None:
            work.keep_tokenizer(path)
        write_plan(work.folder, identity, only_options, options, found, unit_bytes)
    except OSError as error:
        raise unwritable(out, error) from error
    return work


@contextmanager
def _nothing_left(work: Work) -> Iterator[None]:
    """Build in the block: where a small one is refused, nothing of it stays."""
    try:
        yield
    except Changed:
        raise
    except UserError:
        # Of one unit there is nothing to keep that would take long to make again.
        if len(work.plan.units) == 1 and work.noted(SETTLED) is None:
            work.discard()
            with contextlib.suppress(OSError):
                work.out.rmdir()
        raise


def _vocabulary(
    tokenizer: str, separator: str | None, multiple: int | None, sample: int
) -> int | None:
    """Ids of the BPE that is to be trained, if one is. Raises UserError: no such tokenizer."""
    path, trains = given_file(tokenizer), None
    if path is not None:
        read_tokenizer(path, separator, multiple)  # which is refused before anything is read
    else:
        trains = bpe_vocabulary(tokenizer)
        fixed = ByteTokenizer.vocabulary if trains is None else None
        refuse_options(tokenizer, separator, multiple, fixed)
    if trains is None and sample != DEFAULT_BPE_SAMPLE:
        raise UserError(f"--bpe-sample is for bpe:N, and --tokenizer is {tokenizer}; leave it out")
    return trains


def _asked(options: Options, unit_bytes: int) -> list[object]:
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
    if unit_bytes != UNIT_BYTES:
        asked.append({"unit_bytes": unit_bytes})
    return asked


def _beside(options: Options) -> dict[str, object]:
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
    """Refuse options that cannot be, by a UserError; see `build`."""
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


def _up_to_date(
    out: Path,
    index: Index,
    identities: list[str],
    found: Found,
    max_lost: float | None,
    progress: bool,
) -> Index:
    if index["fingerprint"] not in identities:
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
    work = Work(out)
    if work.noted(INDEX) is not None:  # killed when all was done but tidying up
        with contextlib.suppress(OSError):  # as where the folder can only be read
            work.discard()
            (out / BUILDING_NAME).unlink(missing_ok=True)
    if progress:
        say(f"{out} is up to date")
    return index
