"""A data folder for each source, in one build."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from data.building.builds import UNIT, contents, corpus, units, units_by_source
from data.corpora import documents, everything, lines, zst
from data.formats.sources import tokenizer

from nlscale.data import TokenShards, read_index
from nlscale.data.build import begun
from nlscale.data.building.by_source import named_sources
from nlscale.data.building.duplicates import EARLIER, SAME
from nlscale.data.building.share import SHARED, STEPS, share
from nlscale.data.building.work import Work
from nlscale.data.index import INDEX_NAME, UNITS_NAME
from nlscale.data.look.verify import verify_data
from nlscale.data.tokenizer import TOKENIZER_NAME
from nlscale.errors import UserError

BELOW = (1 << 64) // 5
"""What is held out of the tests' builds."""


def place(text: str) -> int:
    """What decides the split of a text, at seed 0."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, salt=bytes(8)).digest()
    return int.from_bytes(digest[:8], "little")


def numbered(count: int, held_out: bool) -> list[str]:
    """Texts that belong to one of the splits."""
    texts = (f"text number {i}" for i in range(100 * count))
    return [text for text in texts if (place(text) < BELOW) == held_out][:count]


def three(folder: Path, masks: bool = False) -> list[str]:
    """Those of `corpus`, with a file that is not read, and a compressed one that is named."""
    sources = corpus(folder, masks)
    (folder / "b" / "figure.svg").write_text("<svg/>")
    path = folder / "c.jsonl.zst"
    path.write_bytes(zst(lines([f"text {i} of c, äöü" for i in range(40)])))
    return [*sources, str(path)]


@pytest.mark.parametrize("options", [{}, {"pack": 64}, {"unit_bytes": 1 << 30}])
def test_each_folder_is_that_of_its_source_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    """To the byte, but for the fingerprint, which is of all of them."""
    sources = three(tmp_path / "in", masks=True)
    tokenizer().save(tmp_path)
    given = f"file:{tmp_path / TOKENIZER_NAME}"
    built = units_by_source(sources, tmp_path / "out", given, **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c"]
    for name, source in zip("abc", sources, strict=True):
        alone = units([source], tmp_path / "alone" / name, given, **options)
        index = read_index(tmp_path / "out" / name)
        assert index == built[name] == {**alone, "fingerprint": index["fingerprint"]}
        here, there = (contents(tmp_path / of / name) for of in ("out", "alone"))
        assert here.pop(INDEX_NAME) != there.pop(INDEX_NAME)
        assert here == there
        assert not verify_data(tmp_path / "out" / name, 1).wrong
    assert len({index["fingerprint"] for index in built.values()}) == 3
    assert [built[name]["skipped"]["count"] for name in "abc"] == [5, 4, 0]
    assert [len(built[name]["left_out"]) for name in "abc"] == [0, 1, 0]
    if not options:  # of units, and of a source that has masks and one that has none
        assert len(built["a"]["splits"]["train"]["shards"]) > 3
        assert [built[name]["format"] for name in "ac"] == [2, 1]


def test_one_tokenizer_of_all_of_the_text(tmp_path: Path) -> None:
    """That of a build into one folder, where the same documents are held out."""
    sources = three(tmp_path / "in")
    options: dict[str, Any] = {"tokenizer": "bpe:280", "bpe_sample": 4000}
    indexes = units_by_source(sources, tmp_path / "out", **options)
    whole = units(sources, tmp_path / "whole", **options)
    assert {index["tokenizer_sha256"] for index in indexes.values()} == {whole["tokenizer_sha256"]}
    alone = units(sources[:1], tmp_path / "alone", **options)
    assert alone["tokenizer_sha256"] != whole["tokenizer_sha256"]


def test_any_number_of_processes_and_shares_of_tasks_build_the_same_bytes(tmp_path: Path) -> None:
    sources = three(tmp_path / "in")
    options: dict[str, Any] = {"tokenizer": "bpe:270", "duplicates": "drop"}
    units_by_source(sources, tmp_path / "1", **options)
    units_by_source(sources, tmp_path / "2", workers=2, **options)
    work = begun(
        sources, "bpe:270", tmp_path / "3", by_source=True, held_out=0.2, shard_tokens=700,
        block_tokens=100, max_lost=0.5, unit_bytes=UNIT, duplicates="drop",
    )  # fmt: skip
    assert isinstance(work, Work)
    of = len(work.plan.units)
    for unit in work.plan.units:
        (source,) = {file.path.relative_to(tmp_path / "in").parts[0] for file in work.files(unit)}
        assert source.startswith(work.plan.folders[unit.folder]["name"])
    for step in STEPS:
        for task in range(1, (3 if step in SHARED else 1) + 1):
            share(tmp_path / "3", step, task, 3 if step in SHARED else 1, workers=1)
    one = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == one == contents(tmp_path / "3")
    assert of > 6 and len([name for name in one if name.endswith(".tar")]) > 10
    assert not list(tmp_path.glob(f"*/{UNITS_NAME}"))


def test_duplicates_are_dropped_in_the_order_of_all_sources(tmp_path: Path) -> None:
    """Against lists of texts."""
    draws = {"a": [1, 2, 3, 2, 4, 5, 6, 7, 8], "b": [9, 3, 9, 10, 11, 3, 12], "c": [12, 9, 13, 14]}
    seen: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    why: dict[str, dict[str, int]] = {}
    for name, numbers in draws.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines([f"text {n}" for n in numbers]))
        expected[name], counts = [], {SAME: 0, EARLIER: 0}
        for text in (f"text {n}" for n in numbers):
            if text not in seen:
                expected[name].append(text)
            else:
                counts[SAME if seen[text] == name else EARLIER] += 1
            seen.setdefault(text, name)
        why[name] = {reason: count for reason, count in counts.items() if count}
    sources = [str(tmp_path / f"{name}.jsonl") for name in draws]
    indexes = units_by_source(sources, tmp_path / "out", duplicates="drop")
    for name, index in indexes.items():
        assert everything(tmp_path / "out" / name) == sorted(expected[name])
        assert index["duplicates"]["reasons"] == why[name]
        assert index["duplicates"]["count"] == len(draws[name]) - len(expected[name])
    assert why == {"a": {SAME: 1}, "b": {SAME: 1, EARLIER: 2}, "c": {EARLIER: 2}}


def test_what_is_left_of_a_source_has_both_splits(tmp_path: Path) -> None:
    """Where all documents that would be held out, or none of the others, came before."""
    low, high = numbered(8, held_out=True), numbered(12, held_out=False)
    texts = {"a": [*low[:5], *high[:4]], "b": [*low[:5], *high[4:9]], "c": [*high[:9], *low[5:]]}
    for name, of in texts.items():
        (tmp_path / f"{name}.jsonl").write_bytes(lines(of))
    sources = [str(tmp_path / f"{name}.jsonl") for name in texts]
    units_by_source(sources, tmp_path / "out", duplicates="drop")
    splits = {
        name: [documents(tmp_path / "out" / name, split) for split in ("train", "validation")]
        for name in texts
    }
    first, last = min(high[4:9], key=place), max(low[5:], key=place)
    assert splits["a"] == [high[:4], low[:5]]
    assert splits["b"] == [[text for text in high[4:9] if text != first], [first]]
    assert splits["c"] == [[last], [text for text in low[5:] if text != last]]
    (tmp_path / "d.jsonl").write_bytes(lines([*low[:5], "one of its own"]))
    with pytest.raises(UserError, match=r"6 documents of d 1 are left.* --duplicates keep") as said:
        units_by_source([*sources, str(tmp_path / "d.jsonl")], tmp_path / "d", duplicates="drop")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        (["data/x.jsonl.zst", "x.txt"], r"data/x\.jsonl\.zst and x\.txt would both .* 'x'; rename"),
        (["web", "data/web/"], "web and data/web/ would both"),
        (["stdlib", "./stdlib"], r"stdlib and \./stdlib would both .*ln -s"),
        (["data/.web"], r"a folder called '\.web', which none"),
        (["slurm"], "a folder called 'slurm', which none"),
        (["data", "web", "data/web/z.txt"], "all that data/web/z.txt holds is in the sources"),
        (["web", "absent"], "no source at absent"),
        (["x.txt", "web"], "the files of x hold only one distinct document"),
    ],
)
def test_sources_of_which_no_folder_can_be_made_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("web", "data/web", "data/.web", "stdlib", "slurm"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "y.txt").write_text(f"y of {name}")
        (tmp_path / name / "z.txt").write_text(f"z of {name}")
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "data" / "x.jsonl.zst").write_bytes(zst(lines(["one", "two"])))
    with pytest.raises(UserError, match=says) as said:
        units_by_source(sources, tmp_path / "out")
    assert "\n" not in str(said.value)
    assert not list(tmp_path.glob(f"out/*/{TOKENIZER_NAME}"))


def test_folders_are_called_as_a_mixture_calls_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web.v2").mkdir()
    for name in ("a.jsonl.zst", "b.PARQUET", "c.d.txt", "tokens.bin", "tokens.idx"):
        (tmp_path / name).touch()
    named = named_sources(
        ["a.jsonl.zst", "web.v2/", "b.PARQUET", "c.d.txt", "stdlib", "tokens.bin", "tokens.idx"]
    )
    assert list(named) == ["a", "web.v2", "b", "c.d", "stdlib", "tokens"]
    assert list(named_sources(["."])) == [tmp_path.name]


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    sources, out = three(tmp_path / "in"), tmp_path / "out"
    before = contents(tmp_path / "in")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"in/a holds 0\.jsonl and is no data folder"):
            units_by_source(sources, tmp_path / "in", overwrite=overwrite)
    assert contents(tmp_path / "in") == before
    units(sources, tmp_path / "one")
    with pytest.raises(UserError, match="one is a data folder, and is to hold one of each"):
        units_by_source(sources, tmp_path / "one", overwrite=True)
    units(sources[:1], out / "a")
    with pytest.raises(UserError, match=r"out/a was built from other sources .* --overwrite"):
        units_by_source(sources, out)
    units_by_source(sources, out, overwrite=True)
    (out / "b" / UNITS_NAME).mkdir()
    with pytest.raises(UserError, match=r"a build of .*out/b alone is not finished"):
        units_by_source(sources, out, overwrite=True)


def test_it_is_up_to_date_when_all_folders_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, out = three(tmp_path / "in"), tmp_path / "out"
    built = units_by_source(sources, out)
    whole = contents(out)
    assert units_by_source(sources, out, progress=True) == built
    assert "is up to date" in capsys.readouterr().err
    with pytest.raises(UserError, match="out/a was built from other sources or options"):
        units_by_source(sources, out, seed=1)
    with pytest.raises(UserError, match="out/b was built from other sources or options"):
        units_by_source([sources[1], sources[0]], out, duplicates="drop")
    (shard := next((out / "b").glob("*.tar"))).unlink()
    with pytest.raises(UserError, match=shard.name):
        units_by_source(sources, out)
    shutil.rmtree(out / "b")
    units_by_source(sources, out)
    assert contents(out) == whole
    # A file in another source of the same names is another build.
    shutil.move(tmp_path / "in" / "b" / "0.jsonl", tmp_path / "in" / "a" / "9.jsonl")
    with pytest.raises(UserError, match="out/a was built from other sources or options"):
        units_by_source(sources, out)


def test_webdataset_reads_each_folder_by_keys_of_its_own(tmp_path: Path) -> None:
    indexes = units_by_source(three(tmp_path / "in"), tmp_path / "out")
    for name, index in indexes.items():
        shards = index["splits"]["train"]["shards"]
        urls = [str(tmp_path / "out" / name / shard["name"]) for shard in shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        keys = [sample["__key__"] for sample in samples]
        assert keys == sorted(set(keys)) and keys[0].endswith("0" * 9)
        read = TokenShards(tmp_path / "out" / name)
        ids = b"".join(sample["tokens.bin"] for sample in samples)
        assert ids == read.read(0, read.tokens).astype(np.uint8).tobytes()
