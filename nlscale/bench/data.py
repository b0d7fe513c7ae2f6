"""How fast text becomes data, and how fast data are read, beside what the machine could do at best.

All in one run and on the same text, so that ratios stand whatever else the machine is doing: a
build in one process and in several, the tokenizer of Hugging Face alone, in one thread; hashing and
writing, below which no build can be; samples read as training reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.bench.progress import each
from nlscale.bench.readers import read_side_by_side
from nlscale.config.units import human_count
from nlscale.data.build import build
from nlscale.data.documents import UnreadableError, read_documents
from nlscale.data.encoders.huggingface import HuggingFaceTokenizer
from nlscale.data.shards import TokenShards
from nlscale.data.sources import find_files
from nlscale.data.tally import shown
from nlscale.data.tokenizer import (
    bpe_vocabulary,
    given_file,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from nlscale.errors import UserError

_UNITS = 4
"""Units a worker: with fewer, one waits for another at the end."""
_SAMPLE = 8 << 20
"""Characters that a BPE is trained on, which is not timed."""
_BATCH = 1 << 20
"""Characters that the tokenizer alone is given at a time."""
_PIECE = 1 << 24
_MB = 1e6


@dataclass(frozen=True)
class Reading:
    """How samples are read."""

    sequence_length: int
    micro_batch: int
    seconds: float
    """For each number of processes."""


def bench_data(
    text: list[str],
    tokenizers: Sequence[str],
    workers: int,
    repeats: int,
    reading: Reading,
    folder: Path,
    read: Path | None = None,
) -> dict[str, Any]:
    """Time builds of a text with each tokenizer, and reading what comes of the last.

    What training a BPE takes is not timed, nor what processes take to start for the first time.

    Args:
        text: documents, see `text_of_sources` and `text_of_data`.
        tokenizers: as `nlscale data build` takes them.
        workers: processes of the builds that have several.
        repeats: times of all, in turn; medians are given.
        reading: how samples are read.
        folder: in which to write, about four times the text.
        read: the data to read; None: what was built with the last of the tokenizers.

    Returns:
        `cores`, `workers`, `repeats`, `text_mb` (in UTF-8, MB are 10^6 bytes), `documents`,
        - `floors`: `sha256_mb_per_second` of one thread, `write_mb_per_second` of one file that is
          synced
        - `builds`, for each tokenizer: `tokenizer`; `alone_mb_per_second`, of text, by Hugging Face
          `tokenizers` alone in one thread (null where they have no part in it);
          `one_mb_per_second` and `all_mb_per_second`, of text, of a whole build in one process and
          in `workers`; `of_alone`, the first of these over that of the tokenizer alone; `speedup`,
          the second over the first; `a_core_mb_per_second`, the second by worker
        - `reads`, for one process and for `workers`: `processes`, `samples_per_second`,
          `tokens_per_second`, `mb_per_second` of what lies on the disk; from the page cache, where
          it has them

    Raises:
        UserError: a tokenizer that cannot be, or too little text for it or for a sample.
    """
    size = sum(len(document.encode()) for document in text)
    source = folder / "text"
    source.mkdir()
    _write_text(text, source, workers * _UNITS)
    given = [folder / f"tokenizer-{i}" for i in range(len(tokenizers))]
    specs = {name: _given(name, text, at) for name, at in zip(tokenizers, given, strict=True)}
    _Build(source, "bytes", folder, size).seconds(min(2, workers))  # which starts the processes
    times: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "one": [], "all": []} for name in tokenizers
    }
    hashed, written = [], []
    rounds = [(i, name) for i in range(repeats) for name in tokenizers]
    for _, name in each("data", rounds, lambda part: f"{part[1]}, time {part[0] + 1}"):
        hashed.append(_hash_seconds(size))
        written.append(_write_seconds(folder / "floor", size))
        work, here = _Build(source, specs[name], folder, size), times[name]
        alone = _alone_seconds(specs[name], text)
        here["alone"] += [] if alone is None else [alone]
        here["one"].append(work.seconds(1))
        here["all"].append(work.seconds(workers))
    builds = []
    for name in tokenizers:
        rates = {
            kind: size / _MB / statistics.median(seconds) if seconds else None
            for kind, seconds in times[name].items()
        }
        one, together, alone = rates["one"], rates["all"], rates["alone"]
        assert one is not None and together is not None
        builds.append(
            {
                "tokenizer": name,
                "alone_mb_per_second": alone,
                "one_mb_per_second": one,
                "all_mb_per_second": together,
                "a_core_mb_per_second": together / workers,
                "of_alone": None if alone is None else one / alone,
                "speedup": together / one,
            }
        )
    return {
        "cores": len(os.sched_getaffinity(0)),
        "workers": workers,
        "repeats": repeats,
        "text_mb": size / _MB,
        "documents": len(text),
        "floors": {
            "sha256_mb_per_second": size / _MB / statistics.median(hashed),
            "write_mb_per_second": size / _MB / statistics.median(written),
        },
        "builds": builds,
        "sequence_length": reading.sequence_length,
        "micro_batch": reading.micro_batch,
        "reads": _reads(folder / "out" if read is None else read, reading, workers),
    }


def text_of_sources(sources: Sequence[str], most: int) -> list[str]:
    """Documents of sources, as `nlscale data build` reads them, up to about so many bytes.

    What cannot be read is passed over.

    Raises:
        UserError: as `nlscale.data.sources.find_files`; or there are none.
    """
    text: list[str] = []
    left = most
    for file in find_files(sources).files:
        try:
            for document in read_documents(file):
                if left > 0 and document.data and not document.error:
                    text.append(document.text)
                    left -= len(document.data)
        except UnreadableError:
            continue
        if left <= 0:
            break
    return _some(text, " ".join(sources))


def text_of_data(directory: Path, most: int) -> list[str]:
    """Documents of the train split of a data folder, decoded, up to about so many bytes.

    Raises:
        UserError: there is no such folder; or it holds no text.
    """
    shards, tokenizer = TokenShards(directory, "train", verify=False), load_tokenizer(directory)
    if not shards.bytes_per_token:
        raise UserError(f"{directory} holds no text; name data of text, or --source")
    count = min(shards.index["splits"]["train"]["tokens"], int(most / shards.bytes_per_token))
    ids = shards.read(0, count)
    parts = np.split(ids, np.flatnonzero(ids == shards.separator) + 1)
    return _some([tokenizer.decode(part) for part in parts], str(directory))


def _some(text: list[str], where: str) -> list[str]:
    text = [document for document in text if document]
    if len(set(text)) < 2:
        raise UserError(f"{where} holds fewer than two documents; name more text")
    return text


def _write_text(text: list[str], folder: Path, files: int) -> None:
    """JSON lines in files of about the same size, of which each is a unit."""
    share, done, number = sum(map(len, text)) / files, 0, 0
    out = open(folder / f"{number:05d}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
    for document in text:
        if done >= share * (number + 1):
            out.close()
            number += 1
            out = open(folder / f"{number:05d}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        json.dump({"text": document}, out, ensure_ascii=False)
        out.write("\n")
        done += len(document)
    out.close()


def _given(spec: str, text: list[str], folder: Path) -> str:
    """What a build is given instead of a tokenizer that it would have to train first."""
    if given_file(spec) is not None or (vocabulary := bpe_vocabulary(spec)) is None:
        return spec
    step = max(1, sum(map(len, text)) // _SAMPLE)
    folder.mkdir()
    train_bpe(text[::step], vocabulary).save(folder)
    return str(folder)


@dataclass(frozen=True)
class _Build:
    source: Path
    tokenizer: str
    folder: Path
    size: int

    def seconds(self, workers: int) -> float:
        """What a whole build takes, in so many processes of one thread each."""
        bytes_on_disk = sum(path.stat().st_size for path in self.source.iterdir())
        files = len(list(self.source.iterdir()))
        unit = max(1, bytes_on_disk // files)
        with _one_thread():
            started = time.perf_counter()
            build(
                [str(self.source)],
                self.tokenizer,
                self.folder / "out",
                workers=workers,
                unit_bytes=unit,
                overwrite=True,
            )
            return time.perf_counter() - started


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hugging Face `tokenizers` keep to one thread, as in the processes of a build."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _alone_seconds(spec: str, text: list[str]) -> float | None:
    """What the tokenizer of Hugging Face takes for the text; None: it is none of theirs."""
    path = given_file(spec)
    if path is None:
        return None
    if not isinstance(read_tokenizer(path), HuggingFaceTokenizer):
        return None
    batches: list[list[str]] = [[]]
    size = 0
    for document in text:
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(document)
        size += len(document)
    import tokenizers as hf

    alone = hf.Tokenizer.from_file(str(path))
    alone.no_truncation()
    alone.no_padding()

    def run() -> None:
        for batch in batches:
            alone.encode_batch_fast(batch, add_special_tokens=False)

    with _one_thread():
        return _seconds(run)


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _hash_seconds(size: int) -> float:
    piece = bytes(min(size, _PIECE))
    digest = hashlib.sha256()

    def run() -> None:
        for begin in range(0, size, len(piece)):
            digest.update(piece[: size - begin])

    return _seconds(run)


def _write_seconds(path: Path, size: int) -> float:
    piece = os.urandom(min(size, _PIECE))  # which no file system compresses

    def run() -> None:
        with open(path, "wb", buffering=0) as out:
            for begin in range(0, size, len(piece)):
                out.write(piece[: size - begin])
            os.fsync(out.fileno())

    try:
        return _seconds(run)
    finally:
        path.unlink(missing_ok=True)


def _reads(data: Path, reading: Reading, workers: int) -> list[dict[str, Any]]:
    width = np.dtype(TokenShards(data, "train", verify=False).index["dtype"]).itemsize
    rows = []
    for processes in dict.fromkeys((1, workers)):
        rate = read_side_by_side(
            data, reading.sequence_length, reading.micro_batch, reading.seconds, processes
        )
        rows.append(
            {
                "processes": processes,
                "samples_per_second": rate,
                "tokens_per_second": rate * reading.sequence_length,
                "mb_per_second": rate * (reading.sequence_length + 1) * width / _MB,
            }
        )
    return rows


def print_data(result: dict[str, Any]) -> None:
    """Print what `bench_data` returns."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    workers, floors = result["workers"], result["floors"]
    console.print(
        f"{result['text_mb']:,.1f} MB of text, {result['documents']:,} documents; MB/s of text, "
        f"median of {result['repeats']}\n"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tokenizer")
    several = f"{workers} processes"
    for column in ("alone", "one process", "of alone", several, "a core", "speedup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["builds"]:
        alone, of_alone = row["alone_mb_per_second"], row["of_alone"]
        table.add_row(
            shown(row["tokenizer"], 40),
            "" if alone is None else f"{alone:,.2f}",
            f"{row['one_mb_per_second']:,.2f}",
            "" if of_alone is None else f"{of_alone:.2f}",
            f"{row['all_mb_per_second']:,.2f}",
            f"{row['a_core_mb_per_second']:,.2f}",
            f"{row['speedup']:.2f}",
        )
    console.print(table)
    console.print(
        f"beside: sha256 {floors['sha256_mb_per_second']:,.0f} MB/s, "
        f"the disk takes {floors['write_mb_per_second']:,.0f} MB/s\n"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("reading processes", "samples/s", "tokens/s", "MB/s"):
        table.add_column(column, justify="right")
    for row in result["reads"]:
        table.add_row(
            f"{row['processes']}",
            f"{row['samples_per_second']:,.0f}",
            human_count(row["tokens_per_second"]),
            f"{row['mb_per_second']:,.1f}",
        )
    console.print(
        f"samples of {result['sequence_length']:,} tokens, {result['micro_batch']} at a time"
    )
    console.print(table)
