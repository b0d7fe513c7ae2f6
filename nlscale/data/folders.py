"""The data folders of a run, opened and held against each other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from nlscale.config.data_sources import mixtures_of, name_of
from nlscale.config.urls import is_url
from nlscale.config.vocabulary import CacheConfig, DataConfig, SourceConfig
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
    weights: tuple[Fraction, ...]
    """Of each mixture of the run its share of the samples, over the sum of those of all folders; 0
    where it is not of that mixture."""
    epochs: tuple[int | None, ...]
    """The same of the times that it is read at most; None: any number."""

    @property
    def fingerprint(self) -> str:
        """What the data are, wherever they lie: a hash of the checksums of their shards."""
        return fingerprint(self.train.index)


def open_folders(data: DataConfig) -> list[Folder]:
    """The folder of `data.dir` alone, or those of all mixtures of the run, as they come.

    Checksums of shards are not compared.

    Raises:
        UserError: a folder or shard is missing; no token of one counts; sources of a mixture have
            other tokenizers, or hold the same data.
    """
    mixtures = [
        {name_of(source): source for source in mixture} for mixture in mixtures_of(data).values()
    ]
    if not mixtures:
        assert data.dir is not None, "settled with the recipe"
        train, held_out = _open(data.dir, data.cache)
        return [Folder(Path(data.dir).name, train, held_out, (Fraction(1),), (None,))]
    sources = {name: source for mixture in mixtures for name, source in mixture.items()}
    splits = {name: _open(source.dir, data.cache) for name, source in sources.items()}
    folders = [
        Folder(
            name,
            train,
            held_out,
            tuple(_weight(m.get(name), train, data.temperature) for m in mixtures),
            tuple(m[name].epochs if name in m else None for m in mixtures),
        )
        for name, (train, held_out) in splits.items()
    ]
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


def _open(directory: str, cache: CacheConfig) -> tuple[TokenShards, TokenShards]:
    train = TokenShards(directory, "train", verify=False, cache=cache)
    held_out = train.beside("validation")
    if not train.counted_tokens:
        raise UserError(
            f"no token of the train split of {directory} counts as a target; mend the masks "
            f"of its sources and build it again"
        )
    return train, held_out


def _weight(source: SourceConfig | None, train: TokenShards, temperature: float) -> Fraction:
    """As it was given, else its tokens to the power of `data.temperature`."""
    if source is None:
        return Fraction(0)
    if source.weight is not None:
        # 0.6 is to be 3/5, not the binary fraction that is next to it
        return Fraction(str(source.weight))
    return Fraction(train.tokens if temperature == 1 else train.tokens**temperature)


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
