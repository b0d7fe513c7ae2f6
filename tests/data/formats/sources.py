"""The same documents written in every format that is read, each as its own program writes it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data.corpora import PACK, lines

from nlscale.data.documents import Document, read_documents
from nlscale.data.sources import find_files
from nlscale.data.tokenizer import Tokenizer, train_bpe

TEXTS = [
    f'document {i}, "quoted"; ä\u2028\r\n<|endoftext|> 漢🙂\n\n{"x" * i},\t{{"a": {i}}}\r'
    for i in range(28)
] + ["short", ","]
Ids = Sequence[Sequence[int]]


def tokenizer() -> Tokenizer:
    """A BPE of 260 ids."""
    return train_bpe(["the cat sat on the mat. " * 20], 260)


def csv_of(texts: list[str], field: str = "text") -> bytes:
    """With a column before the text and one behind it."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["id", field, "more"])
    writer.writerows([n, text, "a,b"] for n, text in enumerate(texts))
    return file.getvalue().encode()


def tar_of(members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def parquet_of(texts: list[str]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), stream, row_group_size=7)
    return stream.getvalue()


STREAMS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "a.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "a.csv": csv_of,
    "a.tar": lambda texts: tar_of([(f"s/{n:04d}.txt", t.encode()) for n, t in enumerate(texts)]),
    "b.tar": lambda texts: tar_of(
        [(f"{n:04d}.json", json.dumps({"text": t}).encode()) for n, t in enumerate(texts)]
    ),
}
"""Of text in one stream, which may be compressed, by name."""


def write_stream(folder: Path, name: str, packed: str, texts: list[str]) -> Path:
    path = folder / f"{name}{packed}"
    path.write_bytes(PACK[packed](STREAMS[name](texts)))
    return path


def write_megatron(path: Path, documents: Ids, code: int = 4, dtype: str = "<i4") -> Path:
    """As megatron-core's IndexedDatasetBuilder does: a sequence a document."""
    size = np.dtype(dtype).itemsize
    lengths = [len(ids) for ids in documents]
    starts = [0, *itertools.accumulate(size * n for n in lengths)][: len(lengths)]
    path.write_bytes(b"".join(np.array(ids, dtype).tobytes() for ids in documents))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    index += np.array(lengths, "<i4").tobytes() + np.array(starts, "<i8").tobytes()
    index += np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index)
    return path


def write_datatrove(path: Path, documents: Ids, masks: Ids | None = None, width: int = 2) -> Path:
    """As datatrove's DocumentTokenizer does, shuffled or not."""
    path.write_bytes(b"".join(np.array(ids, f"<u{width}").tobytes() for ids in documents))
    ends = np.cumsum([len(ids) for ids in documents])
    Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    Path(f"{path}.metadata").write_text(f"gpt2|{width}\n{ends[-1]}\n{ends[-1]}T")
    if masks is not None:
        losses = [np.array(mask, np.bool_).tobytes() for mask in masks]
        Path(f"{path}.loss").write_bytes(b"".join(losses))
    return path


def write_numpy(path: Path, documents: Ids, separator: int, dtype: str = "<u2") -> Path:
    """One behind the other, with a separator behind each."""
    flat = [i for ids in documents for i in [*ids, separator]]
    np.save(path, np.array(flat, dtype))
    return path


def read(path: Path, field: str = "text", by: Tokenizer | None = None) -> list[Document]:
    """All that a source gives, a file or a folder."""
    files = find_files([str(path)]).files
    return [document for file in files for document in read_documents(file, field, by)]


def texts_of(path: Path, field: str = "text", by: Tokenizer | None = None) -> list[str]:
    """The texts of a source, none of which may be lost."""
    found = [document for document in read(path, field, by) if document.left_out is None]
    assert not [document.error for document in found if document.error]
    return [document.text for document in found]
