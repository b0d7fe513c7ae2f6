"""What the reference says of records and plans is what runs write and plans print, field by field.

Both ways: a field that is not described fails, and so does a description of what is not there.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import world
from described import differences
from train.test_train_run import run, small_data

from nlscale.config.recipe import load
from nlscale.plan import load_cluster, make_plan
from nlscale.plan.fields import PLAN
from nlscale.telemetry.fields import ATTEMPTS, METRICS, SUMMARY, Field

ROOT = Path(__file__).parents[2]


def sometimes(fields: Mapping[str, Field], at: str = "") -> set[str]:
    """Those that only some records have."""
    inner = (sometimes(f.fields, f"{at}{k}.") for k, f in fields.items())
    return {f"{at}{k}" for k, f in fields.items() if f.only}.union(*inner)


def present(record: dict[str, Any], fields: Mapping[str, Field], at: str = "") -> set[str]:
    """Dotted names of the described fields that a record has; capitals stand for any name."""
    found = set()
    for key, described in fields.items():
        for name in record if key.isupper() else {key} & record.keys():
            found.add(f"{at}{key}")
            if isinstance(record[name], dict):
                found |= present(record[name], described.fields, f"{at}{key}.")
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run on two nodes of one rank that finishes, and one on a mixture that diverges."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text"
    text.mkdir()
    data, other = small_data(text, documents=40, held_out=0.1), folder / "other"
    other.mkdir()
    more = small_data(other, documents=20, held_out=0.1)
    mixture = f"data.mixture=[{{dir: {data}, name: one}}, {{dir: {more}, name: other}}]"
    good, bad = folder / "good", folder / "bad"
    asked = [
        "evaluate=[loss,positions]",
        "parallel.straggler_check_every=3",
        "checkpoint.every=null",
        "data.stages=[{from: 50%, sequence_length: 64}]",
    ]
    diverges = ["optimizer.learning_rate=1e30", "train.max_dropped_steps=1"]
    ways = {good: [f"data.dir={data}"], bad: [mixture, *diverges]}
    for run_dir, overrides in ways.items():
        here = [f"run.dir={run_dir}", *asked, *overrides]
        world.run(2, run, here, ranks_per_node=1)
    return [good, bad]


def check(records: Iterable[dict[str, Any]], fields: Mapping[str, Mapping[str, Field]]) -> None:
    """Records against their descriptions, by what they say they are."""
    seen: dict[str, set[str]] = {}
    for record in records:
        kind = record.get("kind") or record["event"]
        assert kind in fields, f"records of kind {kind} are not described"
        assert not differences(record, fields[kind]), record
        seen.setdefault(kind, set()).update(present(record, fields[kind]))
    assert seen.keys() == fields.keys(), "a kind that is described was not written"
    never = {k for kind in fields for k in sometimes(fields[kind])} - set().union(*seen.values())
    assert not never, "no record has these"


def test_metrics_are_what_the_reference_says(folders: list[Path]) -> None:
    check([r for folder in folders for r in lines(folder / "metrics.jsonl")], METRICS)


def test_attempts_are_what_the_reference_says(folders: list[Path]) -> None:
    check([r for folder in folders for r in lines(folder / "attempts.jsonl")], ATTEMPTS)


def test_a_summary_is_what_the_reference_says(folders: list[Path]) -> None:
    assert not differences(json.loads((folders[0] / "summary.json").read_text()), SUMMARY)


@pytest.mark.parametrize(("cluster", "rule"), [("two-nodes", "muon"), ("one-node-8-gpus", "adamw")])
def test_a_plan_is_what_the_reference_says(cluster: str, rule: str) -> None:
    keys = ["model.vocabulary=256", "train.global_batch=16", f"optimizer.rule={rule}"]
    config = load("bench-sync", keys).config
    plan = make_plan(config, load_cluster(cluster)).to_plain()
    assert not differences(json.loads(json.dumps(plan)), PLAN)


def test_a_field_that_is_not_described_is_found() -> None:
    """The comparison itself: of names, at every depth, of types and of nulls."""
    inner = {"a": Field("integer", "", "x"), "b": Field("number", "", "x", null="never seen")}
    fields = {
        "o": Field("object", "", "x", fields={"NAME": Field("object", "", "x", fields=inner)})
    }
    assert not differences({"o": {"fast": {"a": 1, "b": None}}}, fields)
    assert differences({"o": {"fast": {"a": True, "c": 1}}}, fields) == {
        "o.fast.a: True is no integer", "o.fast.b: missing", "o.fast.c: not described"
    }  # fmt: skip
    assert differences({"o": None}, fields) == {"o: null"}
    assert not differences({"o": None, "not_finite": ["o"]}, fields | {
        "not_finite": Field("list of texts", "", "x", only="y")
    })  # fmt: skip


@pytest.mark.parametrize(
    ("program", "page", "lines"),
    [("link_table.py", "plan.md", 6), ("optimizer_memories.py", "optimizers.md", 6)],
)
def test_a_table_that_a_program_makes_is_in_its_page(program: str, page: str, lines: int) -> None:
    rows = runpy.run_path(str(ROOT / "tools" / "docs" / program))["rows"]()
    assert len(rows) == lines
    assert "\n".join(rows) in (ROOT / "docs" / "concepts" / page).read_text()
