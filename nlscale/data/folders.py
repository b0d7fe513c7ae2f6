"""The data folders of a run, opened and held against each other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from nlscale.config.data_sources import name_of
from nlscale.config.urls import is_url
from nlscale.config.vocabulary import CacheConfig, DataConfig
from nlscale.data.index import Index, tokenizer_of
from nlscale.data.shards import TokenShards
from nlscale.data.tokenizer import TOKENIZER_NAME
from nlscale.errors import UserError

_SAME = ("tokenizer", "vocabulary", "separator")
"""What indexes of one tokenizer have in common."""


@dataclass(frozen=True)
class Folder:
    """A data folder of a run, whose shards are there with their sizes."""

    name: str
    """Of the source, in metrics."""
    train: TokenShards
    held_out: TokenShards
    weight: Fraction
    """Its share of the samples, over the sum of those of all."""
    epochs: int | None
    """Times that it is read at most; None: any number."""

    @property
    def fingerprint(self) -> str:
        """What the data are, wherever they lie: a hash of the checksums of their shards."""
        return fingerprint(self.train.index)


def open_folders(data: DataConfig) -> list[Folder]:
    """The folder of `data.dir` alone, or those of the mixture, in its order.

    Checksums of shards are not compared.

    Raises:
        UserError: a folder or shard is missing; no token of one counts; sources of a mixture have
            other tokenizers, or hold the same data.
    """
    if data.dir is not None:
        return [_open(Path(data.dir).name, data.dir, data.cache, Fraction(1), None)]
    folders = []
    for source in data.mixture:
        # 0.6 is to be 3/5, not the binary fraction that is next to it
        weight = Fraction(1) if source.weight is None else Fraction(str(source.weight))
        folders.append(_open(name_of(source), source.dir, data.cache, weight, source.epochs))
    if all(source.weight is None for source in data.mixture):
        folders = [_weighed(folder, data.temperature) for folder in folders]
    _refuse_other_tokenizers(folders)
    seen: dict[str, Folder] = {}
    for folder in folders:
        other = seen.setdefault(folder.fingerprint, folder)
        if other is not folder:
            raise UserError(
                f"data.mixture: {other.train.directory} and {folder.train.directory} hold the same "
                f"data; name them once, with the sum of their weights"
            )
    return folders


def fingerprint(index: Index) -> str:
    """What data are, wherever they lie: a hash of the checksums of their shards, in hex."""
    sums = [
        shard["sha256"]
        for name in ("train", "validation")
        for shard in index["splits"][name]["shards"]
    ]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _open(
    name: str, directory: str, cache: CacheConfig, weight: Fraction, epochs: int | None
) -> Folder:
    train = TokenShards(directory, "train", verify=False, cache=cache)
    held_out = train.beside("validation")
    if not train.counted_tokens:
        raise UserError(
            f"no token of the train split of {directory} counts as a target; mend the masks "
            f"of its sources and build it again"
        )
    return Folder(name, train, held_out, weight, epochs)


def _weighed(folder: Folder, temperature: float) -> Folder:
    """With its tokens to the power of `data.temperature` as its weight."""
    tokens = folder.train.tokens
    weight = Fraction(tokens) if temperature == 1 else Fraction(tokens**temperature)
    return Folder(folder.name, folder.train, folder.held_out, weight, folder.epochs)


def _refuse_other_tokenizers(folders: list[Folder]) -> None:
    first = folders[0].train
    for other in (folder.train for folder in folders[1:]):
        for key in _SAME:
            here, there = (dict(one.index)[key] for one in (first, other))
            if here != there:
                raise UserError(
                    f"data.mixture: the {key} of {first.directory} is {here}, and that of "
                    f"{other.directory} is {there}; build both with one tokenizer: --tokenizer "
                    f"{first.directory}"
                )
        known = [tokenizer_of(one.index) for one in (first, other)]
        # indexes of earlier versions do not say which of one name it is
        same = known[0] == known[1] if None not in known else _content(first) == _content(other)
        if not same:
            raise UserError(
                f"data.mixture: {TOKENIZER_NAME} of {first.directory} is not that of "
                f"{other.directory}, and an id of one is another text than of the other; build "
                f"both with one tokenizer: --tokenizer {first.directory}"
            )


def _content(shards: TokenShards) -> Any:
    if is_url(shards.directory):
        raise UserError(
            f"the index of {shards.directory} is of an earlier version and does not say which "
            f"tokenizer its data have; build them again, so that they can be mixed"
        )
    path = Path(shards.directory) / TOKENIZER_NAME
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read {path}: {reason}; restore it, so that the sources of data.mixture can be "
            f"known to have one tokenizer"
        ) from None
