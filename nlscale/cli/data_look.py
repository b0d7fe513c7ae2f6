"""`nlscale data info`: what a data folder holds."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from nlscale.cli.arguments import path
from nlscale.config.urls import Location, is_url
from nlscale.data.index import MASKED_FORMAT, Index, read_index
from nlscale.data.shards import TokenShards
from nlscale.data.tally import mib, shown

_NAMED_SKIPPED = 5


def add_arguments(verbs: Any) -> None:
    """Hang the sub-parsers under `verbs`; each sets `func(args) -> int`."""
    info = verbs.add_parser(
        "info",
        help="show what a data folder holds",
        description="Show what a data folder holds, after checking that no shard is missing.",
    )
    info.add_argument(
        "directory", type=_folder, metavar="DIR", help="a folder made by build, or a URL of one"
    )
    info.set_defaults(func=_info)


def _folder(text: str) -> Location:
    return text.rstrip("/") if is_url(text) else path(text)


def _info(args: argparse.Namespace) -> int:
    index = read_index(args.directory)
    for split in index["splits"]:
        # a UserError names a missing shard; behind a URL that is all that verifying looks for
        TokenShards(args.directory, split, verify=is_url(args.directory))
    show(console(), args.directory, index)
    return 0


def console() -> Console:
    # Paths hold brackets and numbers: no markup, no colours guessed from the text.
    return Console(markup=False, highlight=False, soft_wrap=True)


def show(console: Console, directory: Location, index: Index) -> None:
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
