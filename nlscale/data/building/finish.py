"""The end of a build: the shards of all units get their names, and the indexes are written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from nlscale.data.building.duplicates import reasons
from nlscale.data.building.options import DROP
from nlscale.data.building.settle import settled_of
from nlscale.data.building.tokens import counts_of
from nlscale.data.building.work import INDEX, TOKENS, Changed, Work
from nlscale.data.folder import finish as finish_folder
from nlscale.data.hashed import sync_folder
from nlscale.data.index import (
    BUILDING_NAME,
    INDEX_NAME,
    SPLITS,
    Duplicates,
    Index,
    PackedIndex,
    SourceCounts,
    Split,
)
from nlscale.data.packing import window_of
from nlscale.data.tokenizer import Tokenizer, load_tokenizer
from nlscale.data.verified import Hashing
from nlscale.errors import UserError


def finish(work: Work) -> list[Index]:
    """Bring the shards of all units into the data folders, write their indexes, and return them.

    Killed on the way, it goes on from there.

    Raises:
        UserError: a unit has not been written, or a shard has been altered.
        OSError: the disk does.
    """
    noted = work.noted(INDEX)
    if noted is None:
        noted = _assembled(work)
        work.note(INDEX, noted)
        left = list(zip(work.folders, noted, strict=True))
    else:
        if settled_of(work) is None:
            raise Changed(f"a tokenizer below {work.out} has gone; give the same command again")
        # When it was settled none had an index: those that have one are finished.
        left = [
            (folder, of_folder)
            for folder, of_folder in zip(work.folders, noted, strict=True)
            if not (folder / INDEX_NAME).exists()
        ]
        if altered := next(filter(None, (_moved(work, *one) for one in left)), None):
            work.discard()
            raise altered
    for folder, of_folder in left:
        for unit, name, final in of_folder["moves"]:
            source = work.path(TOKENS, unit) / name
            if source.exists():
                os.replace(source, folder / final)
        sync_folder(folder)
        finish_folder(folder, of_folder["index"])
    for folder in work.folders:  # of one that was killed when its index was written
        (folder / BUILDING_NAME).unlink(missing_ok=True)
    work.discard()
    return [of_folder["index"] for of_folder in noted]


def _moved(work: Work, folder: Path, noted: dict[str, Any]) -> UserError | None:
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
    with Hashing(folder, shards, min(8, os.cpu_count() or 1)) as hashing:
        hashing.wait()
        error = hashing.so_far().error
    if error is not None and not isinstance(error, UserError):
        raise error
    return error and Changed(f"{error}".partition(";")[0] + "; give the same command again")


def _assembled(work: Work) -> list[dict[str, Any]]:
    """Of each data folder the index to be, and which shard of which unit gets which name."""
    settled = settled_of(work)
    if settled is None:
        raise UserError(f"{work.out} is not settled; give the same command again")
    encoder = load_tokenizer(work.folders[0])
    return [
        _of_folder(work, folder, of_folder, settled["ranges"], encoder)
        for folder, of_folder in enumerate(settled["folders"])
    ]


def _of_folder(
    work: Work, folder: int, settled: dict[str, Any], ranges: int, encoder: Tokenizer
) -> dict[str, Any]:
    """Of a data folder the index to be, and which shard of which unit gets which name."""
    plan = work.plan
    names, units = plan.folders[folder]["names"], plan.units_of(folder)
    counts = {split: np.zeros(encoder.vocabulary, dtype=np.int64) for split in SPLITS}
    splits: dict[str, Split] = {}
    moves: list[tuple[int, str, str]] = []
    packed: dict[str, Counter[str]] = {name: Counter() for name in ("cut", "unended", "padding")}
    by_source: list[dict[str, list[list[int]]]] = []
    dropped_bytes, form = 0, 0
    for unit in units:
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
    _add_sources(splits, names, by_source)
    # Here, not at the top: it imports torch, and finding the data up to date should be quick.
    from nlscale.data.writer import counted_bytes, unigram_bits_per_byte

    index = Index(
        format=form,
        fingerprint=plan.fingerprint_of(folder),
        sources=names if plan.options.by_source else plan.options.sources,
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
        why = reasons(work, folder, ranges)
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
