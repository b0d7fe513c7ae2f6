"""Building a data folder of a task: examples instead of documents, all else as with text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nlscale.data.building.asked import check_options
from nlscale.data.building.work import Work
from nlscale.data.folder import clear, finish, refuse_foreign_shards, unwritable
from nlscale.data.index import (
    DEFAULT_BLOCK_TOKENS,
    DEFAULT_HELD_OUT,
    DEFAULT_SHARD_TOKENS,
    INDEX_NAME,
    MASKED_FORMAT,
    Index,
    TaskIndex,
    read_index,
)
from nlscale.data.progress import phase, say
from nlscale.data.shards import TokenShards
from nlscale.data.sources import fingerprint
from nlscale.data.tally import shown
from nlscale.data.tasks.examples import Split, example, identity
from nlscale.data.tasks.table import task_of
from nlscale.errors import UserError

DEFAULT_EXAMPLES = 10_000


def build_task(
    source: str,
    out: str | Path,
    *,
    examples: int = DEFAULT_EXAMPLES,
    held_out: float = DEFAULT_HELD_OUT,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> Index:
    """Draw examples of a task into the data folder `out`, and return its index.

    Examples stand one after the other, each `length` tokens: with `data.sequence_length` equal to
    it a sample is an example, whose last target, the first token of the next, does not count. A
    padding closes each split, for the last example to have one too.

    Args:
        source: the task, such as "task:mqar(length=64)"
        examples: of both splits together
        held_out: the share of them that is for validation, above 0 and below 1; at least one is,
            and at least one is not
        shard_tokens, block_tokens: see `nlscale.data.build.build`
        seed: of all examples, a 64-bit integer
        overwrite: replace what was built from something else
        progress: say on standard error how far it is

    When `out` was already built from the same, it is left as it is.

    Raises:
        UserError: no such task, wrong options, an `out` that holds something else, and a disk that
            cannot be written.
    """
    out, task = Path(out), task_of(source)
    check_options(held_out, shard_tokens, block_tokens, seed)
    if examples < 2:
        raise UserError(f"examples is {examples}; it must be 2 or more, one to hold out")
    kept = min(max(1, round(examples * held_out)), examples - 1)
    counts = {Split.train: examples - kept, Split.validation: kept}
    shard_blocks = shard_tokens // block_tokens
    options = [MASKED_FORMAT, str(task), examples, kept, shard_blocks, block_tokens, seed]
    made_from = fingerprint([], options)
    if not overwrite and (out / INDEX_NAME).exists():
        return _up_to_date(out, made_from, progress)
    refuse_foreign_shards(out)
    for split in counts:
        example(task, split, seed, 0)  # a task of too few is refused before anything is removed
    # Here, not at the top: it imports torch, and finding the data up to date should be quick.
    from nlscale.data.writer import DataWriter

    encoder = task.tokenizer
    repeated = {}
    try:
        Work(out).discard()  # of text that was not finished there
        clear(out)
        encoder.save(out)
        written = DataWriter(out, encoder, shard_blocks, block_tokens, masked=True)
        size = task.length * encoder.dtype.itemsize
        with phase("drawing", examples * size, progress, "examples") as advance:
            for split, count in counts.items():
                seen: set[bytes] = set()
                for number in range(count):
                    ids, mask = example(task, split, seed, number)
                    seen.add(identity(ids))
                    if number == count - 1:
                        ids, mask = np.append(ids, task.padding), np.append(mask, False)
                    written.add_tokens(ids, mask, split.name)
                    advance(size)
                repeated[split.name] = count - len(seen)
        written.close()
        index = Index(
            format=written.format,
            fingerprint=made_from,
            sources=[source],
            tokenizer=encoder.name,
            vocabulary=encoder.vocabulary,
            separator=encoder.separator,
            dtype=encoder.dtype.name,
            block_tokens=block_tokens,
            splits=written.splits(),
            skipped={"count": 0, "first": []},
            empty_documents=0,
            unigram_bits_per_byte=written.unigram_bits_per_byte(),
            task=TaskIndex(
                task=str(task), about=task.about, length=task.length, seed=seed, repeated=repeated
            ),
        )
        finish(out, index)
    except OSError as error:
        raise unwritable(out, error) from error
    return index


def _up_to_date(out: Path, made_from: str, progress: bool) -> Index:
    index = read_index(out)
    if index["fingerprint"] != made_from:
        raise UserError(
            f"{out} was built from another source or other options "
            f"({shown(' '.join(index['sources']))}); choose another --out, or replace it with "
            f"--overwrite"
        )
    for split in index["splits"]:
        TokenShards(out, split, verify=False)  # says so when a shard is missing
    if progress:
        say(f"{out} is up to date")
    return index
