"""Labelled text of package lists: what a list says, and tasks of classes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from nlscale.continual.stream import read_stream

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tools" / "corpora" / "topics.py"
SECTIONS = ("perl", "rust", "haskell", "games", "fonts", "sound", "gnu-r", "science", "electronics")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True
    )


def test_each_task_has_records_of_its_own_sections(tmp_path: Path) -> None:
    packages = [(s, f"what {s} is for, {i}") for s in SECTIONS for i in range(3)]
    # of another area; another section; one that came before; one without a section
    packages += [("non-free/games", "a shop: online"), ("libs", "none"), packages[0]]
    text = "".join(
        f"Package: a{i}\nDescription: {description}\nTag: x::y,\n Section: no\nSection: {s}\n\n"
        for i, (s, description) in enumerate(packages)
    )
    (tmp_path / "Packages").write_text(f"{text}Package: z\nDescription: nowhere\n")
    made = run("--list", tmp_path / "Packages", "--out", tmp_path / "topics", "--most", 3)
    assert made.returncode == 0, made.stderr
    stream, found = read_stream(ROOT / "recipes" / "streams" / "topics.yaml"), {}
    for task, line in zip(stream.tasks, stream.sweep.build_data, strict=True):
        assert f"--source data/topics/{task}.jsonl" in line and f"--out data/topics-{task}" in line
        records = [
            json.loads(one) for one in (tmp_path / f"topics/{task}.jsonl").read_text().splitlines()
        ]
        found[task] = {one["completion"] for one in records}
        assert len(records) == 9
        for one in records:
            (words,) = {one["prompt"]}
            assert words.endswith(". ")
            known = {(s.rpartition("/")[2], d) for s, d in packages}
            assert (one["completion"], words[:-2]) in known
    assert sorted(section for own in found.values() for section in own) == sorted(SECTIONS)
    again = run("--list", tmp_path / "Packages", "--out", tmp_path / "more")
    desktop = (tmp_path / "more/desktop.jsonl").read_text()
    assert again.returncode == 0 and "a shop: online. " in desktop and "nowhere" not in desktop


def test_a_list_without_a_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Packages").write_text("Section: games\nDescription: one\n")
    refused = run("--list", tmp_path / "Packages", "--out", tmp_path / "topics")
    assert refused.returncode == 1
    assert refused.stderr.startswith("topics: no package of section perl")
    assert not (tmp_path / "topics").exists()
