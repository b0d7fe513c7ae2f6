"""Reading every byte of a data folder again, and comparing it with what the index says."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from nlscale.data.index import Index, Shard, Split, read_index
from nlscale.data.look.facts import size_of
from nlscale.data.look.scan import Scan, scan_shards
from nlscale.data.progress import phase
from nlscale.data.tokenizer import load_tokenizer
from nlscale.data.verified import State, forget, remember, state_of
from nlscale.errors import UserError


@dataclass
class Verdict:
    """What was found of a data folder.

    `wrong` says what is wrong, in a line each, with the name of the shard or split that it is wrong
    with; nothing, where all is as the index says.
    """

    shards: int = 0
    bytes: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


def verify_data(
    directory: str | Path, workers: int | None = None, progress: bool = False
) -> Verdict:
    """Compare a data folder with its index, whatever is remembered of it.

    Of each shard: its size, its sha256, and that its ids are within the vocabulary; of each split:
    a separator for each document, the last one at its end, and as many tokens that count as the
    masks say; and the identity of the tokenizer. Shards that are whole are remembered as such, and
    those that are not are forgotten, so that no run takes them for whole.

    Args:
        directory: made by `nlscale data build`.
        workers: threads that read; None: as many as there are cores.
        progress: say on standard error how far it is.

    Raises:
        UserError: there is no index that can be used.
    """
    directory = Path(directory)
    index = read_index(directory)
    workers = workers or len(os.sched_getaffinity(0))
    verdict, whole = Verdict(), {}
    total = sum(map(size_of, index["splits"].values()))
    with phase(f"verifying {directory}", total, progress, "shards") as advance:
        for name, split in index["splits"].items():
            shards = split["shards"]
            states = [_state(directory, shard) for shard in shards]  # as they are before reading
            scans = []
            for scan, shard, state in zip(
                scan_shards(directory, index, shards, workers, advance, hashed=True),
                shards, states, strict=True,
            ):  # fmt: skip
                wrong = _wrong_with(directory, index, shard, scan)
                verdict.wrong += wrong
                if not wrong and state is not None:
                    whole[shard["name"]] = state
                scans.append(scan)
            verdict.shards += len(shards)
            verdict.bytes += size_of(split)
            verdict.tokens += split["tokens"]
            read = [scan for scan in scans if isinstance(scan, Scan)]
            if len(read) == len(shards):  # otherwise nothing is known of the sums
                verdict.wrong += [f"{directory}: {w}" for w in _sums(index, name, split, read)]
    verdict.wrong += _tokenizer(directory, index)
    names = {shard["name"] for split in index["splits"].values() for shard in split["shards"]}
    with contextlib.suppress(OSError):  # a folder that can only be read is legitimate
        remember(directory, whole)
        forget(directory, names - whole.keys())
    return verdict


def _state(directory: Path, shard: Shard) -> State | None:
    try:
        return state_of(directory, shard)
    except UserError:  # of which the scan says why
        return None


def _wrong_with(directory: Path, index: Index, shard: Shard, scan: Scan | UserError) -> list[str]:
    if isinstance(scan, UserError):
        return [str(scan).partition(";")[0]]
    wrong, path = [], directory / shard["name"]
    if scan.sha256 != shard["sha256"]:
        wrong.append(f"shard {path} was altered: its sha256 differs from the index")
    if scan.largest >= index["vocabulary"]:
        wrong.append(
            f"shard {path} holds the id {scan.largest}, the vocabulary has {index['vocabulary']:,}"
        )
    return wrong


def _sums(index: Index, name: str, split: Split, scans: list[Scan]) -> list[str]:
    """What of a split is not what its shards hold together."""
    wrong = []
    tokens = sum(scan.tokens for scan in scans)
    counted = sum(scan.counted for scan in scans)
    if (said := split.get("counted_tokens", split["tokens"])) != counted:
        wrong.append(f"{counted:,} tokens of {name} count, the index says {said:,}")
    if (task := index.get("task")) is not None:
        # Examples stand side by side, and padding behind the last is its last target.
        if (needed := split["documents"] * task["length"] + 1) != tokens:
            wrong.append(f"{name} has {tokens:,} tokens, its examples {needed:,}")
        return wrong
    packed = index.get("packed")
    separators = sum(scan.separators for scan in scans)
    needed = split["documents"]
    if packed:
        needed += packed["padding"][name] - packed["unended"][name]
    if separators != needed:
        wrong.append(f"{name} has {separators:,} separators, by the index {needed:,}")
    if not packed and scans and scans[-1].last:
        wrong.append(f"{name} ends with {scans[-1].last:,} tokens that no separator follows")
    return wrong


def _tokenizer(directory: Path, index: Index) -> list[str]:
    try:
        tokenizer = load_tokenizer(directory)
    except UserError as error:
        return [str(error).partition(";")[0]]
    said = index.get("tokenizer_sha256")  # which earlier versions did not write
    if said is not None and said != tokenizer.identity():
        return [f"{directory}: its tokenizer is not the one that the index names"]
    if (tokenizer.vocabulary, tokenizer.separator) != (index["vocabulary"], index["separator"]):
        return [f"{directory}: its tokenizer has another vocabulary or separator than the index"]
    return []
