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
from typing import TYPE_CHECKING

from nlscale.data.building import passes
from nlscale.data.building.options import DROP, KEEP, UNIT_BYTES, Asked, Options
from nlscale.data.building.units import any_plan, first_change, read_plan, write_plan
from nlscale.data.building.work import INDEX, SETTLED, Changed, Work, kept
from nlscale.data.documents import template_of
from nlscale.data.folder import refuse_foreign_shards, remove_temporary, unwritable
from nlscale.data.index import (
    BUILDING_NAME,
    DEFAULT_BPE_SAMPLE,
    DEFAULT_FIELD,
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

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of `typing` from Python 3.11 on

_MOST_BLOCK = 1 << 27  # tokens; a block is held in memory
_MOST_SHARD = 1 << 40  # tokens: some TiB


def build(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = False,
    **options: Unpack[Asked],
) -> Index:
    """Tokenize `sources` into the data folder `out`, and return its index.

    Args:
        sources: files, folders, or "stdlib" (see `nlscale.data.sources.find_files`)
        tokenizer: "bytes"; "bpe:N", which is trained on a sample of the train documents;
            "file:PATH/tokenizer.json", of another model or of other data; or a folder with one.
            Only with the last two are sources read that are tokens already
        overwrite: replace a build made from other sources or options
        workers: processes that share the units; what they build does not depend on how many
        progress: say on standard error how far it is
        options: fields of `nlscale.data.building.options.Options`, by their names

    When `out` was already built from the same files (names, sizes, modification times) and
    options, it is left as it is. A build that was killed goes on with the units that it had not
    finished; those that it had are compared with their checksums.

    Raises:
        UserError: wrong options, unreadable sources, no or too few documents, more of them lost
            than `max_lost`, an `out` that holds something else, sources that change meanwhile, and
            a disk that cannot be written.
        LostRank: a process was killed.
    """
    work = begun(sources, tokenizer, out, overwrite=overwrite, progress=progress, **options)
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
    overwrite: bool = False,
    progress: bool = False,
    **options: Unpack[Asked],
) -> Work | Index:
    """What `build` does before any text is read: what is to be built, or the index that is there.

    What an earlier attempt has made of the same is kept. Arguments are those of `build`.

    Raises:
        UserError: as `build`, of what is known before the text is read.
    """
    out = Path(out)
    asked_for = Options(sources=list(sources), tokenizer=tokenizer, **options)
    _check(asked_for)
    found = find_files(sources, out)
    asked, beside = _asked(asked_for), _beside(asked_for)
    identities = [fingerprint(found.files, [*asked, beside] if beside else asked)]
    identity = identities[0]
    there = (out / INDEX_NAME).exists()
    if not overwrite and there:
        index = read_index(out)
        if beside and beside.items() <= index.items():  # builds of earlier versions do not name it
            identities.append(fingerprint(found.files, asked))
        return _up_to_date(out, index, identities, found, asked_for.max_lost, progress)
    refuse_foreign_shards(out)
    losses = Losses(found, asked_for.text_field)
    losses.check_left_out(asked_for.max_lost)  # before hours of reading
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
        write_plan(work.folder, identity, only_options, asked_for, found)
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


def _check(options: Options) -> None:
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


def _asked(options: Options) -> list[object]:
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
