"""Whether the cache of shards of another service is large enough for a run, and what it costs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from nlscale.config.units import human_bytes
from nlscale.data import TokenShards
from nlscale.data.remote.folder import RemoteFolder
from nlscale.errors import UserError


def check_cache(splits: Sequence[TokenShards], samples: int) -> list[str]:
    """See that `data.cache.size` is enough for a step, and there on the disk.

    Each sample of a step may be in another shard, and a shard is fetched whole: a cache that has
    no room for those of one step fetches some of them several times in it.

    Args:
        splits: all that the run reads; those of this machine's file system do not matter.
        samples: of the train splits, that the ranks of this machine read in a step.

    Returns:
        What there is to say of it, each in a line.

    Raises:
        UserError: it is not enough, or the disk has less; the numbers, and what to give.
    """
    far = [split for split in splits if isinstance(split.folder, RemoteFolder)]
    if not far:
        return []
    folder = far[0].folder
    assert isinstance(folder, RemoteFolder)
    cache = folder.cache
    # by their content: sources may share shards
    of_all = {shard["sha256"]: shard["size_bytes"] for split in far for shard in split.shards}
    read = {
        shard["sha256"]: shard["size_bytes"]
        for split in far
        if split.split == "train"
        for shard in split.shards
    }
    total, step = sum(of_all.values()), sum(sorted(read.values())[-samples:])
    if cache.size < step:
        raise UserError(
            f"data.cache.size is {human_bytes(cache.size)}, and the {samples:,} samples that this "
            f"machine reads in a step may lie in shards of {human_bytes(step)}; give at least "
            f"that, best {human_bytes(total)} for all, or build with smaller --shard-tokens"
        )
    needed, held = min(total, cache.size), cache.used()
    free = shutil.disk_usage(cache.directory).free
    if free + held < needed:
        raise UserError(
            f"{cache.directory} has room for {human_bytes(free + held)}, and data.cache.size "
            f"{human_bytes(cache.size)} lets shards take {human_bytes(needed)} of it; give a "
            f"smaller size, or a data.cache.dir on another disk"
        )
    if cache.size >= total:
        return []
    missing = 1 - cache.size / total
    mean = sum(read.values()) / len(read)
    again = min(samples, len(read)) * missing * mean
    return [
        f"data.cache.size {human_bytes(cache.size)} holds {1 - missing:.0%} of the "
        f"{human_bytes(total)} of shards: of {samples:,} samples that this machine reads in a "
        f"step, about {missing:.0%} are in a shard ({human_bytes(mean)}) that has to be fetched "
        f"again, {human_bytes(again)} a step; {human_bytes(total)} would fetch each shard once"
    ]
