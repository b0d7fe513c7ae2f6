"""Documents that came before are dropped, against a list of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.building.builds import corpus, units
from data.corpora import everything, lines

from nlscale.data.building import duplicates
from nlscale.data.building.duplicates import EARLIER, SAME


def reference(sources: list[str]) -> tuple[list[str], dict[str, int], int]:
    """The texts that stay, sorted, why others do not, and their bytes: one list, looked up."""
    kept: list[tuple[str, str]] = []
    origin: list[str] = []
    reasons = {SAME: 0, EARLIER: 0}
    size = 0
    for source in sources:
        for path in sorted(Path(source).iterdir()):
            text = path.read_text(encoding="utf-8")
            records = [text] if path.suffix == ".txt" else text.splitlines()
            for line in records:
                try:
                    record = json.loads(line) if path.suffix != ".txt" else {"text": line}
                except ValueError:
                    continue
                if not record["text"]:
                    continue
                entry = (record["text"], repr(record.get("mask")))
                if entry in kept:
                    same = origin[kept.index(entry)] == source
                    reasons[SAME if same else EARLIER] += 1
                    size += len(record["text"].encode())
                else:
                    kept.append(entry)
                    origin.append(source)
    return sorted(text for text, _ in kept), reasons, size


@pytest.mark.parametrize("run", [1, 7, 1000])
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
def test_each_document_stays_once_and_the_others_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: bool, run: int
) -> None:
    monkeypatch.setattr(duplicates, "_RUN", run)
    monkeypatch.setattr(duplicates, "_RANGE", 30 if run < 1000 else 1000)
    sources = corpus(tmp_path / "in", masks)
    index = units(sources, tmp_path / "out", duplicates="drop")
    kept, reasons, size = reference(sources)
    assert everything(tmp_path / "out") == kept
    found = index["duplicates"]
    assert found == {"count": sum(reasons.values()), "bytes": size, "reasons": reasons}
    assert min(reasons.values()) > 10
    if masks:  # the same text with another mask is another document
        assert len(set(kept)) < len(kept)


def test_the_first_stays(tmp_path: Path) -> None:
    texts = ["one", "two", "one", "three", "two", "four", "four"]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    index = units([str(tmp_path / "a.jsonl")], tmp_path / "out", duplicates="drop")
    assert everything(tmp_path / "out") == ["four", "one", "three", "two"]
    assert index["duplicates"]["reasons"] == {SAME: 3}


def test_they_are_kept_unless_asked_for(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "in")
    index = units(sources, tmp_path / "out")
    assert "duplicates" not in index
    texts = everything(tmp_path / "out")
    assert len(set(texts)) < len(texts)
