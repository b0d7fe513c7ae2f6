"""What is printed of data folders, by `nlscale data build` and by those that look into them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nlscale.cli.arguments import FILE_WIDTH
from nlscale.config.units import human_bytes, human_count
from nlscale.config.urls import Location
from nlscale.data.index import MASKED_FORMAT, SPLITS, Index
from nlscale.data.look.facts import Facts, facts_of
from nlscale.data.tally import mib, shown

_NAMED_SKIPPED = 5
_NAMED_SOURCES = 40
_PLAIN = re.compile(r"[\w.-]*/[\w./-]*")
"""A path that YAML takes for a text without quotes, also among others."""


def console() -> Console:
    """Of standard output, for text that others wrote."""
    # Paths hold brackets and numbers: no markup, no colours guessed from the text.
    width = None if sys.stdout.isatty() else FILE_WIDTH
    return Console(markup=False, highlight=False, soft_wrap=True, width=width)


def show(console: Console, directory: Location, index: Index) -> None:
    """Print what an index says of a data folder."""
    table = Table(title=f"{directory}", title_justify="left")
    table.add_column("")
    for name in index["splits"]:
        table.add_column(name, justify="right")
    splits = index["splits"].values()
    disk = [sum(shard["size_bytes"] for shard in split["shards"]) / 2**20 for split in splits]
    table.add_row("documents", *(f"{split['documents']:,}" for split in splits))
    table.add_row("tokens", *(f"{split['tokens']:,}" for split in splits))
    if index["format"] == MASKED_FORMAT:
        counted = [(split["counted_tokens"], split["tokens"]) for split in splits]
        table.add_row("tokens that count", *(f"{n:,} ({n / of:.1%})" for n, of in counted))
    table.add_row("bytes of text", *(f"{split['bytes']:,}" for split in splits))
    table.add_row("bytes a token", *(f"{s['bytes'] / s['tokens']:.3f}" for s in splits))
    table.add_row("shards", *(f"{len(split['shards']):,}" for split in splits))
    table.add_row("size on disk", *(f"{size:,.1f} MiB" for size in disk))
    console.print(table)
    console.print(
        f"tokenizer {shown(index['tokenizer'])}, vocabulary {index['vocabulary']:,}, separator "
        f"{index['separator']}, {index['dtype']}, blocks of {index['block_tokens']:,} tokens"
    )
    console.print(f"sources {shown(' '.join(index['sources']))}")
    _show_sources(console, index)
    if (task := index.get("task")) is not None:
        again = ", ".join(f"{name} {count:,}" for name, count in task["repeated"].items())
        console.print(
            f"task {shown(task['task'])}: {shown(task['about'])}; examples of {task['length']:,} "
            f"tokens, of which had come before: {again}"
        )
    if (packed := index.get("packed")) is not None:
        cut, padding = sum(packed["cut"].values()), sum(packed["padding"].values())
        documents = sum(split["documents"] for split in splits)
        tokens = sum(split["tokens"] for split in splits)
        console.print(
            f"packed into samples of {packed['length']:,} tokens: {cut:,} of {documents:,} "
            f"documents cut ({cut / documents:.2%}), padding {padding / tokens:.2%} of the tokens"
        )
    if (unigram := index["unigram_bits_per_byte"]) is not None:
        console.print(f"unigram {unigram:.4f} bits per byte of validation text")
    _show_lost(console, index)


def _show_sources(console: Console, index: Index) -> None:
    """What came of each, where there are several: of train, and the tokens of validation."""
    # An index may come from anywhere, and have one split alone.
    splits = index["splits"]
    train, held_out = (splits[name].get("sources", []) if name in splits else [] for name in SPLITS)
    if len(train) < 2:
        return
    table = Table()
    table.add_column("source", overflow="fold")
    for column in ("documents", "tokens", "share", "bytes a token", "validation"):
        table.add_column(column, justify="right", no_wrap=True)
    whole = max(1, sum(counts["tokens"] for counts in train))
    for number, counts in enumerate(train[:_NAMED_SOURCES]):
        tokens = counts["tokens"]
        table.add_row(
            shown(counts["source"], 60),
            f"{counts['documents']:,}",
            f"{tokens:,}",
            f"{tokens / whole:.1%}",
            f"{counts['bytes'] / tokens:.3f}" if tokens else "",
            f"{held_out[number]['tokens']:,}" if number < len(held_out) else "",
        )
    console.print(table)
    if len(train) > _NAMED_SOURCES:
        console.print(f"  and {len(train) - _NAMED_SOURCES:,} more sources")


def show_lengths(console: Console, facts: Facts) -> None:
    """Print the lengths of the documents of a folder, where they were read."""
    found = {n: split["lengths"] for n, split in facts["splits"].items() if split["lengths"]}
    if not found:
        return
    what = "pieces in packed samples" if "packed" in facts else "documents"
    table = Table(title=f"lengths of {what}, in tokens", title_justify="left")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    every = list(found.values())
    table.add_row("shortest", *(f"{lengths['least']:,}" for lengths in every))
    for share in every[0]["quantiles"]:
        named = "median" if share == "0.5" else f"{float(share):.0%} up to"
        table.add_row(named, *(f"{lengths['quantiles'][share]:,}" for lengths in every))
    table.add_row("longest", *(f"{lengths['most']:,}" for lengths in every))
    table.add_row("mean", *(f"{lengths['mean']:,.1f}" for lengths in every))
    console.print(table)


def show_folders(console: Console, folders: Sequence[Facts]) -> None:
    """Print several folders, a row each, and all of them together."""
    table = Table()
    table.add_column("folder", overflow="fold")
    train = [facts["splits"]["train"] for facts in folders]
    medians = ["median"] if any(split["lengths"] for split in train) else []
    columns = ("documents", "tokens", "share", "bytes a token", *medians, "validation", "on disk")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("tokenizer", overflow="fold")
    tokens = sum(split["tokens"] for split in train)
    for facts, split in zip(folders, train, strict=True):
        lengths: Any = split["lengths"]
        table.add_row(
            shown(facts["directory"], 60),
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['tokens'] / tokens:.1%}",
            f"{split['bytes'] / split['tokens']:.3f}",
            *(f"{lengths['quantiles']['0.5']:,}" if lengths else "" for _ in medians),
            human_count(facts["splits"]["validation"]["tokens"]),
            human_bytes(sum(split["size_bytes"] for split in facts["splits"].values())),
            shown(facts["tokenizer"], 40),
        )
    together = (f"{sum(split['documents'] for split in train):,}", f"{tokens:,}")
    table.add_row("all", *together, end_section=True)
    console.print(table)
    console.print("documents, tokens and lengths are of train; of validation its tokens")


def show_by_source(console: Console, folders: Mapping[Path, Index]) -> None:
    """Print what a build made of each source, and the lines of a recipe that mixes them."""
    found = facts_of(list(folders), lengths=False)
    named = [{**facts, "directory": Path(facts["directory"]).name} for facts in found]
    console.print(f"in {shown(str(next(iter(folders)).parent))}")
    show_folders(console, named)
    for folder, index in folders.items():
        if lost := _lost(index):
            console.print(f"{shown(folder.name)}: {', '.join(lost)}")
    console.print("data:\n  mixture:  # by tokens; or give each a weight: {dir: ..., weight: 0.5}")
    for folder in folders:
        console.print(f"    - {{dir: {_in_yaml(str(folder))}}}")


def _lost(index: Index) -> list[str]:
    """What of the sources is not in the data, in words."""
    left, gone = index["left_out"], index.get("duplicates")
    counts = {
        "unreadable documents": index["skipped"]["count"],
        "empty ones": index["empty_documents"],
        f"of {index['lost_files']['of']:,} files lost": index["lost_files"]["count"],
        "duplicates dropped": 0 if gone is None else gone["count"],
        "other files not read": sum(entry["count"] for entry in left),
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def _in_yaml(text: str) -> str:
    """A text as YAML reads it among others."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _show_lost(console: Console, index: Index) -> None:
    skipped = index["skipped"]
    console.print(
        f"skipped {skipped['count']:,} unreadable and {index['empty_documents']:,} empty documents"
        + _by_reason(skipped.get("reasons", {}))
    )
    entries = [(entry["document"], entry["reason"]) for entry in skipped["first"]]
    _show_first(console, skipped["count"], entries)
    if "lost_files" in index:
        lost = index["lost_files"]
        console.print(
            f"lost {lost['count']:,} of {lost['of']:,} files" + _by_reason(lost["reasons"])
        )
        named = [(entry["file"], entry["reason"]) for entry in lost["first"]]
        _show_first(console, lost["count"], named)
    if (gone := index.get("duplicates")) is not None:
        console.print(
            f"dropped {gone['count']:,} duplicates ({mib(gone['bytes'])})"
            + _by_reason(gone["reasons"])
        )
    if "left_out" in index:
        left = index["left_out"]
        console.print(
            f"not read {sum(entry['count'] for entry in left):,} others in the folders"
            + _by_reason({entry["reason"]: entry["count"] for entry in left})
        )
        for entry in (entry for entry in left[:_NAMED_SKIPPED] if entry["bytes"]):
            some = ", ".join(shown(name) for name in entry["first"])
            console.print(f"  {shown(entry['reason'])} ({mib(entry['bytes'])}): {some}")


def _by_reason(reasons: dict[str, int]) -> str:
    """What a number consists of; nothing where there is nothing."""
    named = list(reasons.items())[:_NAMED_SKIPPED]
    more = ", ..." if len(reasons) > len(named) else ""
    return ": " + ", ".join(f"{shown(r)} {n:,}" for r, n in named) + more if named else ""


def _show_first(console: Console, count: int, entries: list[tuple[str, str]]) -> None:
    named = entries[:_NAMED_SKIPPED]
    for name, reason in named:
        console.print(f"  {shown(name)}: {shown(reason)}")
    if count > len(named):
        console.print(f"  and {count - len(named):,} more")
