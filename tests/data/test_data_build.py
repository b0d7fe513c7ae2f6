"""Building: what is on disk is the text, reproducibly, and only when it is finished."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from data.corpora import documents, small

from nlscale.data import TokenShards, read_index
from nlscale.data.build import build
from nlscale.data.tokenizer import load_tokenizer
from nlscale.errors import UserError


def write_texts(folder: Path, count: int = 40) -> list[str]:
    """Documents of various lengths, one a file, in sorted order."""
    folder.mkdir()
    texts = [f"document {i}: " + "äb c\r\n" * (i * 7 % 31) for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_bytes(text.encode())
    return texts


def digests(out: Path) -> list[str]:
    index = read_index(out)
    return [shard["sha256"] for split in index["splits"].values() for shard in split["shards"]]


def test_what_is_read_is_the_text_in_order(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in")
    index = small([str(tmp_path / "in")], tmp_path / "out")
    train, held = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert [text for text in texts if text in train] == train
    assert [text for text in texts if text in held] == held
    assert sorted(train + held) == sorted(texts)
    for split, parts in (("train", train), ("validation", held)):
        entry = index["splits"][split]
        size = sum(len(part.encode()) for part in parts)
        assert (entry["documents"], entry["bytes"]) == (len(parts), size)
        assert entry["tokens"] == size + len(parts)
        assert TokenShards(tmp_path / "out", split).bytes_per_token == size / entry["tokens"]
    assert len(index["splits"]["train"]["shards"]) > 3


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    index = small([str(tmp_path / "in")], tmp_path / "out")
    names = [shard["name"] for shard in index["splits"]["train"]["shards"]]
    urls = [str(tmp_path / "out" / name) for name in names]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    samples = [np.frombuffer(sample["tokens.bin"], dtype=np.uint8) for sample in dataset]
    assert {len(sample) for sample in samples[:-1]} == {100}
    shards = TokenShards(tmp_path / "out")
    assert np.array_equal(np.concatenate(samples), shards.read(0, shards.tokens))


def test_offsets_are_those_of_the_tar(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    index = small([str(tmp_path / "in")], tmp_path / "out")
    for shard in index["splits"]["train"]["shards"]:
        with tarfile.open(tmp_path / "out" / shard["name"]) as tar:
            members = tar.getmembers()
        offsets = [shard["offset"] + i * shard["stride"] for i in range(shard["blocks"])]
        assert [member.offset_data for member in members] == offsets


def test_jsonl_and_parquet_and_what_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    lines = [b'{"text": "one"}', b"", b'{"text": "two"', b'{"no": 1}', b'{"text": "\\ud800"}']
    lines += [b"\xff\xfe", b'["text"]', b'{"text": "three \xc3\xa4", "more": 2}']
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    table = pa.table({"text": ["four", None, "five", ""], "id": [1, 2, 3, 4]})
    pq.write_table(table, folder / "deep" / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"id": [1]}), folder / "c.parquet")
    (folder / "d.parquet").write_bytes(b"no parquet")
    (folder / "e.txt").write_bytes(b"caf\xe9")
    (folder / "f.MD").write_text("six")
    (folder / "ignored.bin").write_bytes(b"\x00")
    (folder / ".hidden.txt").write_text("hidden")
    index = small([str(folder)], tmp_path / "out", max_lost=1.0)
    read = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "validation")
    assert sorted(read) == sorted(["one", "three ä", "four", "five", "six"])
    assert index["empty_documents"] == 1
    skipped = {entry["document"]: entry["reason"] for entry in index["skipped"]["first"]}
    places = ["a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:6", "a.jsonl:7"]
    places += ["deep/b.parquet:1", "e.txt"]
    assert set(skipped) == {f"{folder}/{place}" for place in places}
    assert index["skipped"]["count"] == len(places)
    assert "not UTF-8" in skipped[f"{folder}/e.txt"]
    lost = {entry["file"] for entry in index["lost_files"]["first"]}
    assert lost == {f"{folder}/c.parquet", f"{folder}/d.parquet"}
    assert (index["lost_files"]["count"], index["lost_files"]["of"]) == (2, 6)


def test_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    small([str(tmp_path / "in")], tmp_path / "one")
    small([str(tmp_path / "copy")], tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_held_out_documents_stay_held_out_when_files_are_added(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    small([str(tmp_path / "in")], tmp_path / "one")
    (tmp_path / "in" / "000a.txt").write_text("something new")
    (tmp_path / "in" / "zzz.txt").write_text("something else")
    small([str(tmp_path / "in")], tmp_path / "two")
    assert set(documents(tmp_path / "one", "validation")) <= set(
        documents(tmp_path / "two", "validation")
    )
    small([str(tmp_path / "in")], tmp_path / "three", seed=1)
    assert documents(tmp_path / "two", "validation") != documents(tmp_path / "three", "validation")


@pytest.mark.parametrize("held_out", [1e-12, 1 - 1e-12])
def test_each_split_gets_a_document(tmp_path: Path, held_out: float) -> None:
    write_texts(tmp_path / "in", count=3)
    index = small([str(tmp_path / "in")], tmp_path / "out", held_out=held_out)
    counts = [index["splits"][split]["documents"] for split in ("train", "validation")]
    assert sorted(counts) == [1, 2]


def test_unigram_figure_against_the_definition(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    index = small([str(tmp_path / "in")], tmp_path / "out")
    train = b"".join(d.encode() + b"\xff" for d in documents(tmp_path / "out", "train"))
    held = documents(tmp_path / "out", "validation")
    bits = 0.0
    for token in b"".join(d.encode() + b"\xff" for d in held):
        bits -= np.log2((train.count(token) + 1) / (len(train) + 256))
    expected = bits / sum(len(d.encode()) for d in held)
    assert index["unigram_bits_per_byte"] == pytest.approx(expected, rel=1e-12)


def test_bpe_build_is_reproducible_and_decodes_to_the_text(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "in")
    for name in ("one", "two"):
        build([str(tmp_path / "in")], "bpe:290", tmp_path / name, held_out=0.2, block_tokens=64)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    index = read_index(tmp_path / "one")
    assert (index["tokenizer"], index["vocabulary"], index["dtype"]) == ("bpe:290", 290, "uint16")
    tokenizer = load_tokenizer(tmp_path / "one")
    found = []
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "one", split)
        ids = shards.read(0, shards.tokens)
        ends = np.flatnonzero(ids == index["separator"])
        found += [tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted(texts)


def test_building_again_is_only_done_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "in")
    source, out = [str(tmp_path / "in")], tmp_path / "out"
    first = small(source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert small(source, out, progress=True) == first
    assert "up to date" in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    with pytest.raises(UserError, match="--overwrite"):
        small(source, out, block_tokens=50)
    (tmp_path / "in" / "new.txt").write_text("new")
    with pytest.raises(UserError, match="--overwrite"):
        small(source, out)
    assert read_index(out) == first

    (tmp_path / "in" / "new.txt").unlink()
    (out / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is missing.*--overwrite"):
        small(source, out)

    index = small(source, out, shard_tokens=10**6, overwrite=True)
    assert len(list(out.glob("*.tar"))) == 2
    assert index == read_index(out)
    documents(out, "train")


def test_a_killed_build_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "in")
    source, out = [str(tmp_path / "in")], tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nlscale.data.folder.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            small(source, out)
    assert list(out.glob("train-*.tar"))
    with pytest.raises(UserError, match="never finished"):
        TokenShards(out)
    small(source, out, shard_tokens=10**6)
    assert len(list(out.glob("*.tar"))) == 2
    documents(out, "train")


def test_shards_of_others_are_not_deleted(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    theirs = tmp_path / "out" / "train-000000.tar"
    theirs.parent.mkdir()
    theirs.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"train-000000\.tar"):
        small([str(tmp_path / "in")], tmp_path / "out", overwrite=True)
    assert theirs.read_bytes() == b"precious"


def test_a_full_disk_is_an_error_and_leaves_no_index(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    code = (
        "import sys, nlscale.data.writer\n"
        "from nlscale.data.build import build\n"
        "from nlscale.errors import UserError\n"
        "try: build([sys.argv[1]], 'bytes', sys.argv[2], block_tokens=100)\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert f"cannot write {tmp_path / 'out'}" in done.stdout
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()


def test_sources_that_change_meanwhile_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "in")

    def change(out: Path) -> None:
        out.mkdir(exist_ok=True)
        (tmp_path / "in" / "003.txt").write_text("changed")

    monkeypatch.setattr("nlscale.data.building.settle.clear", change)
    with pytest.raises(UserError, match="changed while"):
        small([str(tmp_path / "in")], tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "source", "options", "message"),
    [
        ({}, "nowhere", {}, "no source at"),
        ({"in.bin": b"x"}, "in.bin", {}, "suffix"),
        ({"in/a.bin": b"x"}, "in", {}, r"nothing that can be read.*\.bin 1"),
        ({"in/a.txt": b"\xff"}, "in", {}, r"no documents that can be read: not UTF-8 1.*a\.txt"),
        ({"in/a.txt": b"x", "in/b.txt": b"x"}, "in", {}, "one distinct document"),
        ({"a.txt": b"x"}, "a.txt", {"held_out": 0.0}, "held-out"),
        ({"a.txt": b"x"}, "a.txt", {"shard_tokens": 10}, "--shard-tokens 100"),
        ({"a.txt": b"x"}, "a.txt", {"block_tokens": 0}, "block tokens"),
        ({"a.txt": b"x"}, "a.txt", {"block_tokens": 10**12}, "block tokens"),
        ({"a.txt": b"x"}, "a.txt", {"shard_tokens": 10**30}, "shard tokens"),
        ({"a.txt": b"x"}, "a.txt", {"shard_tokens": -1}, "shard tokens"),
        ({"a.txt": b"x"}, "a.txt", {"held_out": float("nan")}, "held-out"),
        ({"a.txt": b"x"}, "a.txt", {"held_out": 1.0}, "held-out"),
        ({"a.txt": b"x"}, "a.txt", {"held_out": -0.1}, "held-out"),
        ({"a.txt": b"x"}, "a.txt", {"held_out": float("inf")}, "held-out"),
        ({"a.txt": b"x"}, "a.txt", {"max_lost": float("nan")}, "max-lost"),
        ({"a.txt": b"x"}, "a.txt", {"max_lost": -0.1}, "max-lost"),
        ({"a.txt": b"x"}, "a.txt", {"max_lost": 1.1}, "max-lost"),
        ({"a.txt": b"x"}, "a.txt", {"seed": 1 << 64}, "seed"),
        ({"a.txt": b"x"}, "a.txt", {"text_field": ""}, "text field"),
    ],
)
def test_what_a_user_can_get_wrong(
    tmp_path: Path, files: dict[str, bytes], source: str, options: dict[str, float], message: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        small([str(tmp_path / source)], tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_stdlib_source(tmp_path: Path) -> None:
    index = build(["stdlib"], "bytes", tmp_path / "out")
    train = index["splits"]["train"]
    assert train["tokens"] > 5_000_000
    assert train["documents"] > 20 * index["splits"]["validation"]["documents"] > 0
    assert 4.0 < index["unigram_bits_per_byte"] < 5.5
    everything = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "validation")
    assert Path(os.__file__).read_text(encoding="utf-8") in everything
    assert read_index(tmp_path / "out") == index


def test_data_can_have_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    write_texts(tmp_path / "in")
    build([str(tmp_path / "in")], "bpe:270", tmp_path / "first", held_out=0.2)
    index = build([str(tmp_path / "in")], str(tmp_path / "first"), tmp_path / "out", held_out=0.2)
    assert (index["tokenizer"], index["vocabulary"]) == ("bpe:270", 270)
    assert digests(tmp_path / "out") == digests(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "moved")  # what it is counts, not where it lies
    again = build([str(tmp_path / "in")], str(tmp_path / "moved"), tmp_path / "out", held_out=0.2)
    assert again["fingerprint"] == index["fingerprint"]
    with pytest.raises(UserError, match="no tokenizer at"):
        build([str(tmp_path / "in")], str(tmp_path / "in"), tmp_path / "other", held_out=0.2)
