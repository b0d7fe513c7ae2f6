"""The ranks compare shards that nobody has seen whole with their sha256: together, having met.

Reading all data takes minutes to hours, so ranks that see the same files deal them among
themselves; copies on the disks of nodes are other files, and each is read by the ranks that see it.
Threads read and hash, while every few seconds the ranks meet in a small reduction: no collective
waits for a file, the first rank shows how far they are, and all hear of a shard that was altered.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from nlscale.checkpoint.store.together import Ranks
from nlscale.cluster import spread
from nlscale.cluster.life.place import place
from nlscale.cluster.life.watch import doing
from nlscale.config.units import human_bytes
from nlscale.config.vocabulary import Config
from nlscale.data.index import INDEX_NAME, Shard
from nlscale.data.progress import Advance, phase, say
from nlscale.data.shards import TokenShards
from nlscale.data.verified import VERIFIED_NAME, Hashing, SoFar, State, not_remembered, remember
from nlscale.errors import LostRank, UserError
from nlscale.parallel.layout import Layout
from nlscale.train.prepare import Prepared

_ROUND_SECONDS = 2.0
"""Between two meetings of the ranks while they hash."""
_ROUNDS_OF_A_TIMEOUT = 4
"""So many at least in `timeouts.startup`, after which one that does not end is a hang."""
_T = TypeVar("_T")


def verify_data(config: Config, prepared: Prepared, layout: Layout) -> None:
    """Hash the shards that `.verified.json` does not know, and note there that they are whole.

    The same call on every rank. Behind a URL the first rank sees in a listing that they are there.
    Nothing is read, and nothing said, where all of them are known.

    Raises:
        UserError: a shard was altered or cannot be read; on every rank, naming the host.
        LostRank: of a shard no byte came for `timeouts.startup`; on every rank.
    """
    for folder in prepared.folders:
        _verify_folder(config, (folder.train, folder.held_out), layout)


def _verify_folder(config: Config, splits: Sequence[TokenShards], layout: Layout) -> None:
    directory = splits[0].directory
    if not isinstance(directory, Path):  # their sha256 is compared when they are fetched
        with doing("listing the data"):
            for split in splits:
                Ranks(layout.host).first(partial(split.folder.check, split.shards))
        return
    shards = [shard for split in splits for shard in split.shards]
    states = {name: state for split in splits for name, state in split.states.items()}
    with doing("comparing what each rank sees of the data"):
        firsts = _firsts(layout, directory)
        unknown = _unknown(layout, firsts, directory, shards, states)
    if not unknown:
        return
    sizes = [shard["size_bytes"] for shard in shards]
    same = Counter(firsts)
    count = sum(len(numbers) for numbers in unknown.values())
    total = int(sum(np.take(sizes, numbers).sum() for numbers in unknown.values()))
    readers = sum(min(len(numbers), same[first]) for first, numbers in unknown.items())
    if layout.is_writer:
        say(
            f"hashing {_count(count, 'shard')} ({human_bytes(total)}) that were never checked, on "
            f"{_count(readers, 'rank')}"
        )
    first = firsts[layout.rank]
    ranks = [rank for rank in range(layout.world) if firsts[rank] == first]
    numbers = unknown[first].tolist() if first in unknown else []
    parts = deal(sizes, numbers, spread_over_hosts(ranks, layout.hosts))
    mine = [shards[number] for number in parts.get(layout.rank, [])]
    me = f"rank {layout.rank} on {layout.hosts[layout.rank]}"
    with (
        Hashing(directory, mine, _threads(), me) as hashing,
        phase("hashing", total, layout.is_writer, "shards") as advance,
    ):
        failed = _hash(hashing, layout, config.timeouts.startup, me, advance)
    with doing("noting which data are whole"):
        _remember(layout, firsts, directory, shards, states, hashing.so_far().whole)
    if failed is not None:
        raise failed


def deal(
    sizes: Sequence[int], numbers: Sequence[int], ranks: Sequence[int]
) -> dict[int, list[int]]:
    """Which rank takes which shards: the largest first, each to who has the fewest bytes.

    Args:
        sizes: bytes of every shard, by number.
        numbers: the shards to deal.
        ranks: among which; where several have as few, the first of them takes it.

    Returns:
        The shards of each rank that has some, largest first; the same wherever it is computed.
    """
    parts = spread.deal({number: sizes[number] for number in numbers}, len(ranks))
    return {rank: part for rank, part in zip(ranks, parts, strict=True) if part}


def spread_over_hosts(ranks: Sequence[int], hosts: Sequence[str]) -> list[int]:
    """These ranks, one of each host before the second of any: few shards use the links of all."""
    met: Counter[str] = Counter()
    turns = []
    for rank in ranks:
        turns.append((met[hosts[rank]], rank))
        met[hosts[rank]] += 1
    return [rank for _, rank in sorted(turns)]


def _firsts(layout: Layout, directory: Path) -> list[int]:
    """For each rank, the first that sees the same files."""
    stat = os.stat(directory / INDEX_NAME)
    seen = _gather(layout, (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size))
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(files, rank) for rank, files in enumerate(seen)]


def _unknown(
    layout: Layout,
    firsts: Sequence[int],
    directory: Path,
    shards: Sequence[Shard],
    states: Mapping[str, State],
) -> dict[int, NDArray[np.int64]]:
    """Numbers of the shards to hash, by the first rank that sees them; without those of none."""
    names: Iterable[str] = ()
    if firsts[layout.rank] == layout.rank:
        names = not_remembered(directory, states)
    everyones = enumerate(_gather_shards(layout, shards, names))
    return {rank: numbers for rank, numbers in everyones if len(numbers)}


def _hash(
    hashing: Hashing, layout: Layout, timeout: float, me: str, advance: Advance
) -> UserError | None:
    """Meet the others until all have hashed; the error of the first rank that has one."""
    seen_bytes = seen_shards = 0
    pause = min(_ROUND_SECONDS, timeout / _ROUNDS_OF_A_TIMEOUT)
    while True:
        with doing("hashing the data"):
            hashing.wait(pause)
            now = hashing.so_far()
            error = _what_is_wrong(hashing, now, timeout, me)
            own = [now.bytes, len(now.whole), not now.over, error is not None]
            report = torch.tensor(own, dtype=torch.int64, device="cpu")
            dist.all_reduce(report, group=layout.host)
        read, whole, working, failed = report.tolist()
        advance(read - seen_bytes, whole - seen_shards)
        seen_bytes, seen_shards = read, whole
        if failed:
            with doing("hearing what is wrong with the data"):
                return next(filter(None, _gather(layout, error)))
        if not working:
            return None


def _what_is_wrong(hashing: Hashing, now: SoFar, timeout: float, me: str) -> UserError | None:
    """With a shard of this rank, if anything is."""
    if now.error is not None and not isinstance(now.error, UserError):
        raise now.error  # none of the data: a bug
    if now.error is None and (path := hashing.stuck(timeout)) is not None:
        return LostRank(
            f"{me}: no byte of {path} for {timeout:g} s (timeouts.startup) while it is hashed; "
            f"look at the file system there, then start again"
        )
    return now.error


def _remember(
    layout: Layout,
    firsts: Sequence[int],
    directory: Path,
    shards: Sequence[Shard],
    states: Mapping[str, State],
    mine: Iterable[str],
) -> None:
    """Note which shards are whole: the first rank that sees them, for all that do."""
    everyones = _gather_shards(layout, shards, mine)
    seen = [everyones[rank] for rank in range(layout.world) if firsts[rank] == layout.rank]
    names = [shards[number]["name"] for numbers in seen for number in numbers]
    refused = None
    try:
        if names:
            remember(directory, {name: states[name] for name in names})
    except OSError as error:
        # A folder that may only be read is legitimate.
        refused = f"{layout.hosts[layout.rank]} ({error.strerror})"
    refusals = [refusal for refusal in _gather(layout, refused) if refusal]
    if refusals and layout.is_writer:
        say(
            f"warning: {directory / VERIFIED_NAME} cannot be written on {refusals[0]}, so these "
            f"shards are hashed again at each start; start once where the folder can be written, "
            f"or build the data anew, which leaves that file"
        )


def _gather_shards(
    layout: Layout, shards: Sequence[Shard], names: Iterable[str]
) -> list[NDArray[np.int64]]:
    """The numbers of the shards that every rank names.

    A bit a shard goes around: there may be tens of thousands, and as many ranks.
    """
    wanted = set(names)
    mask = np.packbits([shard["name"] in wanted for shard in shards]).tobytes() if wanted else b""
    masks = _gather(layout, mask)
    return [np.flatnonzero(np.unpackbits(np.frombuffer(m, np.uint8))) for m in masks]


def _gather(layout: Layout, mine: _T) -> list[_T]:
    """That of every rank."""
    everyones: list[Any] = [None] * layout.world
    dist.all_gather_object(everyones, mine, group=layout.host)
    return everyones


def _threads() -> int:
    """This rank's share of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // place().local_world)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
