"""The end of a build: the shards of all units get their names, and the index is written."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np

from nlscale.data.building.duplicates import reasons
from nlscale.data.building.options import DROP
from nlscale.data.building.settle import settled_of
from nlscale.data.building.tokens import counts_of
from nlscale.data.building.work import INDEX, TOKENS, Changed, Work
from nlscale.data.folder import finish as finish_folder
from nlscale.data.hashed import sync_folder
from nlscale.data.index import SPLITS, Duplicates, Index, PackedIndex, SourceCounts, Split
from nlscale.data.packing import window_of
from nlscale.data.tokenizer import load_tokenizer
from nlscale.data.verified import Hashing
from nlscale.errors import UserError


def finish(work: Work) -> Index:
    """Bring the shards of all units into the folder, write its index, and return it.

    Killed on the way, it goes on from there.

    Raises:
        UserError: a unit has not been written, or a shard has been altered.
        OSError: the disk does.
    """
    noted = work.noted(INDEX)
    if noted is None:
        noted = _assembled(work)
        work.note(INDEX, noted)
        altered = None
    else:
        altered = _moved(work, noted)
    index: Index = noted["index"]
    if altered is not None:
        work.discard()
        raise altered
    for unit, name, final in noted["moves"]:
        source = work.path(TOKENS, unit) / name
        if source.exists():
            os.replace(source, work.out / final)
    sync_folder(work.out)
    finish_folder(work.out, index)
    work.discard()
    return index


def _moved(work: Work, noted: dict[str, Any]) -> UserError | None:
    """What is wrong with the shards that an earlier attempt brought there, if anything is."""
    index: Index = noted["index"]
    waiting = {
        final for unit, name, final in noted["moves"] if (work.path(TOKENS, unit) / name).exists()
    }
    shards = [
        shard
        for split in index["splits"].values()
        for shard in split["shards"]
        if shard["name"] not in waiting
    ]
    with Hashing(work.out, shards, min(8, os.cpu_count() or 1)) as hashing:
        hashing.wait()
        error = hashing.so_far().error
    if error is not None and not isinstance(error, UserError):
        raise error
    return error and Changed(f"{error}".partition(";")[0] + "; give the same command again")


def _assembled(work: Work) -> dict[str, Any]:
    """The index to be, and which shard of which unit gets which name."""
    plan, settled = work.plan, settled_of(work)
    if settled is None:
        raise UserError(f"{work.out} is not settled; give the same command again")
    encoder = load_tokenizer(work.out)
    counts = {split: np.zeros(encoder.vocabulary, dtype=np.int64) for split in SPLITS}
    splits: dict[str, Split] = {}
    moves: list[tuple[int, str, str]] = []
    packed: dict[str, Counter[str]] = {name: Counter() for name in ("cut", "unended", "padding")}
    by_source: list[dict[str, list[list[int]]]] = []
    dropped_bytes, form = 0, 0
    for unit in plan.units:
        written = work.made(TOKENS, unit.number)
        dropped_bytes += written["dropped_bytes"]
        form = written["format"]
        for figure, by_split in written["packed"].items():
            packed[figure].update(by_split)
        for split, of_unit in counts_of(work, unit.number, encoder.vocabulary).items():
            counts[split] += of_unit
        for split, entry in written["splits"].items():
            _add(splits, split, entry, unit.number, moves)
        by_source.append(written["sources"])
    _add_sources(splits, plan.found["names"], by_source)
    # Here, not at the top: it imports torch, and finding the data up to date should be quick.
    from nlscale.data.writer import counted_bytes, unigram_bits_per_byte

    index = Index(
        format=form,
        fingerprint=plan.identity,
        sources=plan.options.sources,
        tokenizer=encoder.name,
        tokenizer_sha256=encoder.identity(),
        vocabulary=encoder.vocabulary,
        separator=encoder.separator,
        dtype=encoder.dtype.name,
        block_tokens=plan.options.block_tokens,
        splits=splits,
        skipped=settled["skipped"],
        lost_files=settled["lost_files"],
        left_out=settled["left_out"],
        text_field=plan.options.text_field,
        empty_documents=settled["empty"],
        unigram_bits_per_byte=unigram_bits_per_byte(counts, counted_bytes(splits["validation"])),
    )
    if (length := plan.options.pack) is not None:
        index["packed"] = PackedIndex(
            length=length,
            window=window_of(length),
            cut={split: packed["cut"][split] for split in SPLITS},
            unended={split: packed["unended"][split] for split in SPLITS},
            padding={split: packed["padding"][split] for split in SPLITS},
        )
    if plan.options.duplicates == DROP:
        why = reasons(work, settled["ranges"])
        index["duplicates"] = Duplicates(count=sum(why.values()), bytes=dropped_bytes, reasons=why)
    return {"index": index, "moves": moves}


def _add(
    splits: dict[str, Split], name: str, entry: Split, unit: int, moves: list[tuple[int, str, str]]
) -> None:
    """Add what a unit has of a split to what those before it have, its shards renamed."""
    shards = entry.pop("shards")  # type: ignore[misc]
    total = splits.setdefault(name, Split(documents=0, tokens=0, bytes=0, shards=[]))
    for figure, value in entry.items():
        total[figure] = total.get(figure, 0) + value  # type: ignore[literal-required, operator]
    for shard in shards:
        final = f"{name}-{len(total['shards']):06d}.tar"
        moves.append((unit, shard["name"], final))
        total["shards"].append({**shard, "name": final})


def _add_sources(
    splits: dict[str, Split], names: list[str], units: list[dict[str, list[list[int]]]]
) -> None:
    """Say what came of each source, of which every unit has counted a part."""
    for split, entry in splits.items():
        totals = np.zeros((len(names), 3), dtype=np.int64)
        for of_unit in units:
            for number, *figures in of_unit[split]:
                totals[number] += figures
        entry["sources"] = [
            SourceCounts(source=name, documents=figures[0], tokens=figures[1], bytes=figures[2])
            for name, figures in zip(names, totals.tolist(), strict=True)
        ]
