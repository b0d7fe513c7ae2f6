"""The pages of what runs, plans and evaluations write, made of the tables of fields in the code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nlscale.evaluate.fields import ANSWERS, FAILED
from nlscale.plan.fields import PLAN
from nlscale.telemetry.fields import ATTEMPTS, METRICS, SUMMARY, Field

_NAMES = """
A name in capitals stands for names that the run or the configuration gives, `[]` for the entries
of a list.
"""
_NOT_FINITE = """
A number that is infinite or no number is written as null, and `not_finite` lists the dotted names
of such fields.
"""
_METRICS = f"""# metrics.jsonl

A run appends a line of JSON to `metrics.jsonl` in its folder after every step and every
validation; `kind` says what it is. A run that resumes first drops the lines after the step that it
goes on from, so that no step stands there twice.
{_NAMES}{_NOT_FINITE}
"""
_ATTEMPTS = """
## attempts.jsonl

Each start of a run, and why it ended, is a line of `attempts.jsonl` beside it. The goodput in
[summary.json](summary.md#goodput) follows from both.
"""
_SUMMARY = f"""# summary.json

What a run that has finished leaves in its folder. `nlscale fit` reads it.
{_NAMES}{_NOT_FINITE}
"""
_PLAN = f"""# plan --json

What [`nlscale plan --json`](commands.md#plan) prints. Bytes of traffic are those that leave one
node, the mean over the nodes; link seconds are those bytes at the full rate of a node's links.
{_NAMES}
"""
_EVAL = f"""# eval --json

What [`nlscale eval --json`](commands.md#eval) prints or writes: the object of one model, or of
several a list of them in the order in which they were named. Shares are from 0 to 1. All but the
first three fields also lie in the folder `evals` of the model, as `result`, beside the `options`
that were asked for. What a package has [added](../how-to/add-an-evaluation.md#of-a-trained-model)
has fields of its own behind the first three.
{_NAMES}
"""
_FAILED = """
## A model that could not be asked { #failed }

Where several were asked, it is in the list all the same, and the exit code is 1.

"""


def metrics() -> str:
    """The page of metrics.jsonl and attempts.jsonl in Markdown."""
    kinds = [f"## {kind} {{ #{kind} }}\n\n{_table(of, kind)}" for kind, of in METRICS.items()]
    events = [
        f"### {event} {{ #{event} }}\n\n{_table(of, event)}" for event, of in ATTEMPTS.items()
    ]
    return "\n".join([_METRICS, *kinds, _ATTEMPTS, *events])


def summary() -> str:
    """The page of summary.json in Markdown."""
    return _SUMMARY + _table(SUMMARY, "")


def plan() -> str:
    """The page of a plan in Markdown."""
    return _PLAN + _table(PLAN, "")


def evaluations() -> str:
    """The page of what evaluations find in Markdown."""
    parts = [
        f"## {name} {{ #{anchor} }}\n\n{_table(of, anchor)}"
        for name, of in ANSWERS.items()
        for anchor in [name.replace(", ", "-").replace(" ", "-")]
    ]
    return "\n".join([_EVAL, *parts, _FAILED + _table(FAILED, "failed")])


def _table(fields: Mapping[str, Field], anchor: str) -> str:
    rows = _rows(fields, f"{anchor}." if anchor else "", "")
    head = ["| field | type | unit | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join(['<div class="fields" markdown>\n', *head, *rows, "\n</div>\n"])


def _rows(fields: Mapping[str, Field], anchor: str, prefix: str) -> Iterator[str]:
    for name, one in fields.items():
        meaning = f"{one.meaning[0].upper()}{one.meaning[1:]}."
        if one.null:
            meaning += f" Null: {one.null}."
        if one.only:
            meaning += f" *Only where {one.only}.*"
        kind = f"{one.type} or null" if one.null else one.type
        key = f"{prefix}{name}"
        yield f"| `{key}`{{ #{anchor}{key} }} | {kind} | {one.unit} | {meaning} |"
        entry = "[]" if one.type.startswith("list of") else ""
        yield from _rows(one.fields, anchor, f"{key}{entry}.")
