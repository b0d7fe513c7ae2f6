"""`nlscale data build` and `nlscale data info`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nlscale.data.index import DEFAULT_HELD_OUT, DEFAULT_SHARD_TOKENS, Index, read_index
from nlscale.data.shards import TokenShards

_NAMED_SKIPPED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang the `build` and `info` sub-parsers under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    build = verbs.add_parser(
        "build",
        help="tokenize text into shards",
        description="Tokenize text into webdataset shards and an index. Running it again with "
        "the same sources and options does nothing; a build that was killed starts over.",
    )
    build.add_argument(
        "--source",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files or folders (.txt .rst .md .py: one document a file; .jsonl and .parquet: "
        "the field or column 'text'), or stdlib: the Python standard library's own text",
    )
    build.add_argument(
        "--tokenizer",
        required=True,
        metavar="bytes|bpe:N",
        help="bytes: UTF-8 bytes, vocabulary 256; bpe:N: a byte-level BPE of N ids, trained on "
        "the source text",
    )
    build.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the data folder to make"
    )
    build.add_argument(
        "--held-out",
        type=float,
        default=DEFAULT_HELD_OUT,
        metavar="F",
        help="share of the documents kept for validation (default: %(default)s)",
    )
    build.add_argument(
        "--shard-tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="the most tokens in one shard file (default: %(default)s)",
    )
    build.add_argument(
        "--overwrite",
        action="store_true",
        help="build anew, replacing what DIR holds from an earlier build",
    )
    build.set_defaults(func=_build)

    info = verbs.add_parser(
        "info",
        help="show what a data folder holds",
        description="Show what a data folder holds, after checking that no shard is missing.",
    )
    info.add_argument("directory", type=Path, metavar="DIR", help="a folder made by build")
    info.set_defaults(func=_info)


def _build(args: argparse.Namespace) -> int:
    from nlscale.data.build import build  # pyarrow and the tokenizers are slow to import

    started = time.monotonic()
    index = build(
        args.source,
        args.tokenizer,
        args.out,
        held_out=args.held_out,
        shard_tokens=args.shard_tokens,
        overwrite=args.overwrite,
        progress=True,
    )
    console = _console()
    _show(console, args.out, index)
    console.print(f"{time.monotonic() - started:.1f} seconds")
    return 0


def _info(args: argparse.Namespace) -> int:
    index = read_index(args.directory)
    for split in index["splits"]:
        TokenShards(args.directory, split, verify=False)  # a UserError names a missing shard
    _show(_console(), args.directory, index)
    return 0


def _console() -> Console:
    # Paths hold brackets and numbers: no markup, no colours guessed from the text.
    return Console(markup=False, highlight=False, soft_wrap=True)


def _show(console: Console, directory: Path, index: Index) -> None:
    table = Table(title=f"{directory}", title_justify="left")
    table.add_column("")
    for name in index["splits"]:
        table.add_column(name, justify="right")
    splits = index["splits"].values()
    disk = [sum(shard["size_bytes"] for shard in split["shards"]) / 2**20 for split in splits]
    table.add_row("documents", *(f"{split['documents']:,}" for split in splits))
    table.add_row("tokens", *(f"{split['tokens']:,}" for split in splits))
    table.add_row("bytes of text", *(f"{split['bytes']:,}" for split in splits))
    table.add_row("bytes a token", *(f"{s['bytes'] / s['tokens']:.3f}" for s in splits))
    table.add_row("shards", *(f"{len(split['shards']):,}" for split in splits))
    table.add_row("size on disk", *(f"{size:,.1f} MiB" for size in disk))
    console.print(table)
    console.print(
        f"tokenizer {index['tokenizer']}, vocabulary {index['vocabulary']:,}, separator "
        f"{index['separator']}, {index['dtype']}, blocks of {index['block_tokens']:,} tokens"
    )
    console.print(f"sources {' '.join(index['sources'])}")
    console.print(f"unigram {index['unigram_bits_per_byte']:.4f} bits per byte of validation text")
    skipped = index["skipped"]
    console.print(
        f"skipped {skipped['count']:,} unreadable and {index['empty_documents']:,} empty documents"
    )
    named = skipped["first"][:_NAMED_SKIPPED]
    for entry in named:
        console.print(f"  {entry['document']}: {entry['reason']}")
    if skipped["count"] > len(named):
        console.print(f"  and {skipped['count'] - len(named):,} more")
