"""Lengths of documents and counts by source, against what is in the shards, token by token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.corpora import documents, small

from nlscale.data import TokenShards
from nlscale.data.index import INDEX_NAME, SPLITS, read_index
from nlscale.data.look import scan
from nlscale.data.look.facts import facts_of
from nlscale.data.look.lengths import QUANTILES, Lengths
from nlscale.errors import UserError

LENGTH = 64
BUILDS: dict[str, dict[str, Any]] = {
    "one unit": {},
    "units": {"unit_bytes": 500},
    "packed": {"pack": LENGTH, "unit_bytes": 1500},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders of plain text and a file in which a part counts; letters tell them apart."""
    folder, draw = tmp_path_factory.mktemp("in"), random.Random(3)
    for name, letter in (("short", "s"), ("long", "l")):
        (folder / name).mkdir()
        for i in range(14):
            size = draw.randrange(1, 40) if name == "short" else draw.randrange(100, 400)
            (folder / name / f"{i:02d}.txt").write_text(f"{letter}{i:02d}" + "x" * size)
    with open(folder / "masked.jsonl", "w") as out:
        for i in range(12):
            completion = "y" * draw.randrange(1, 60)
            out.write(json.dumps({"prompt": f"m{i:02d}? ", "completion": completion}) + "\n")
    return {name: folder / name for name in ("short", "masked.jsonl", "long")}


@pytest.fixture(scope="module", params=BUILDS)
def data(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("data") / "out"
    small(list(map(str, sources.values())), out, **BUILDS[request.param])
    return out


def lengths_in(data: Path, split: str) -> list[int]:
    """One by one: documents end with their separator, and pieces with a packed sample, too."""
    index, shards = read_index(data), TokenShards(data, split)
    ids = shards.read(0, index["splits"][split]["tokens"]).tolist()
    packed, lengths, here = "packed" in index, [], 0
    for place, token in enumerate(ids):
        if packed and place % LENGTH == 0:
            lengths, here = [*lengths, here], 0
        if token == shards.separator:
            lengths, here = [*lengths, here], 0
        else:
            here += 1
    assert packed or not here
    return sorted(n for n in [*lengths, here] if n) if packed else sorted(lengths)


@pytest.mark.parametrize("chunk", [1, 250, 8 << 20])
def test_lengths_are_those_of_the_documents(
    data: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    (facts,) = facts_of([data], workers=3)
    assert facts["splits"]["train"]["shards"] > 2
    for split in SPLITS:
        there, found = lengths_in(data, split), facts["splits"][split]["lengths"]
        assert found["documents"] == len(there)
        assert found["mean"] == pytest.approx(np.mean(there))
        assert (found["least"], found["most"]) == (there[0], there[-1])
        for share in QUANTILES:
            at = next(n for n in there if sum(m <= n for m in there) >= share * len(there))
            assert found["quantiles"][str(share)] == at
        for octave in found["octaves"]:
            low = octave["low"]
            inside = [n for n in there if low <= max(1, n) < 2 * low]
            assert (octave["documents"], octave["tokens"]) == (len(inside), sum(inside))
        assert sum(octave["documents"] for octave in found["octaves"]) == len(there)
    if "packed" not in facts:
        for split in SPLITS:
            assert facts["splits"][split]["lengths"]["documents"] == len(documents(data, split))


def test_counts_by_source_are_those_of_its_documents(
    data: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Against builds without units and packing, in which documents can be told by their letter."""
    small(list(map(str, sources.values())), tmp_path / "plain")
    index = read_index(data)
    for split in SPLITS:
        texts = documents(tmp_path / "plain", split)
        for (name, path), counts in zip(
            sources.items(), index["splits"][split]["sources"], strict=True
        ):
            mine = [text for text in texts if text[0] == name[0]]
            size = sum(len(text.encode()) for text in mine)
            ends = [len(text.encode()) % LENGTH > 0 or "packed" not in index for text in mine]
            assert counts == {
                "source": str(path),
                "documents": len(mine),
                "tokens": size + sum(ends),
                "bytes": size,
            }


def test_an_index_whose_sources_do_not_add_up_is_refused(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    small([str(sources["short"]), str(sources["long"])], tmp_path)
    path = tmp_path / INDEX_NAME
    index = json.loads(path.read_text())
    index["splits"]["train"]["sources"][0]["tokens"] += 1
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"splits\.train\.tokens is .*the sum of its sources"):
        read_index(tmp_path)
    del index["splits"]["train"]["sources"], index["splits"]["validation"]["sources"]
    path.write_text(json.dumps(index))
    assert "sources" not in facts_of([tmp_path])[0]["splits"]["train"]  # as of earlier versions


def test_no_lengths_are_nothing() -> None:
    assert Lengths().figures() is None
    empty = Lengths()
    empty.add(0, 3)
    figures = empty.figures()
    assert figures is not None and figures["octaves"] == [{"low": 1, "documents": 3, "tokens": 0}]


def test_lengths_that_are_not_asked_for_are_not_read(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small([str(sources["short"])], tmp_path)
    monkeypatch.delattr(scan, "_scan")
    (facts,) = facts_of([tmp_path], lengths=False)
    assert facts["splits"]["train"]["lengths"] is None
    assert facts["splits"]["train"]["sources"][0]["source"] == str(sources["short"])
