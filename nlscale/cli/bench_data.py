"""`nlscale bench data`: how fast text becomes data, and how fast data are read."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from nlscale.cli.arguments import number, path, size, whole
from nlscale.cluster.life.place import alone
from nlscale.errors import UserError

_TEXT, _TOKENIZERS = "stdlib", ["bytes", "bpe:8192"]


def add_arguments(verbs: Any) -> None:
    """Hang the sub-parser under `verbs`; it sets `func(args) -> int`."""
    data = verbs.add_parser(
        "data",
        help="how fast text becomes data, and how fast data are read",
        description="Build data from some text with each tokenizer, in one process and in several, "
        "beside the tokenizer of Hugging Face alone in one thread, sha256 and the disk; then read "
        "samples as training does. All in one run, so that the ratios can be compared.",
    )
    data.add_argument(
        "directory",
        nargs="?",
        type=path,
        metavar="DIR",
        help="a folder made by build: its text is taken, and its samples are read (default: text "
        "of --source, and what is built of it)",
    )
    data.add_argument(
        "--source",
        nargs="+",
        metavar="PATH",
        help=f"where the text is, as for `nlscale data build` (default: {_TEXT})",
    )
    data.add_argument(
        "--tokenizer",
        nargs="+",
        metavar="bytes|bpe:N|file:JSON|FOLDER",
        help=f"as for `nlscale data build` (default: {' '.join(_TOKENIZERS)}; with DIR its own)",
    )
    data.add_argument(
        "--text",
        type=size,
        default=32 << 20,
        metavar="SIZE",
        help="the most text to take (default: 32MiB)",
    )
    data.add_argument(
        "--workers",
        type=whole(least=1, most=4096),
        metavar="N",
        help="processes that build, and that read (default: the cores)",
    )
    data.add_argument(
        "--repeats",
        type=whole(least=1),
        default=3,
        metavar="N",
        help="times (default: %(default)s)",
    )
    data.add_argument(
        "--sequence-length",
        type=whole(least=1),
        default=1024,
        metavar="S",
        help="tokens of a sample that is read (default: %(default)s)",
    )
    data.add_argument(
        "--micro-batch",
        type=whole(least=1),
        default=8,
        metavar="N",
        help="samples that are read at a time (default: %(default)s)",
    )
    data.add_argument(
        "--seconds",
        type=number(above=0),
        default=2.0,
        metavar="N",
        help="to read for (default: %(default)g)",
    )
    data.add_argument(
        "--out",
        type=path,
        metavar="FOLDER",
        help="where to write, and remove at the end (default: where temporary files lie)",
    )
    data.add_argument("--json", action="store_true", help="print JSON instead of tables")
    data.set_defaults(func=_data)


def _data(args: argparse.Namespace) -> int:
    alone("bench data")
    if args.directory is not None and args.source is not None:
        raise UserError("bench data takes the text of DIR or of --source; leave one out")
    # slow to import
    from nlscale.bench.data import (
        Reading,
        bench_data,
        print_data,
        text_of_data,
        text_of_sources,
    )

    tokenizers = args.tokenizer or _TOKENIZERS
    if args.directory is not None:
        text = text_of_data(args.directory, args.text)
        tokenizers = args.tokenizer or [str(args.directory)]
    else:
        text = text_of_sources(args.source or [_TEXT], args.text)
    workers = args.workers or len(os.sched_getaffinity(0))
    reading = Reading(args.sequence_length, args.micro_batch, args.seconds)
    try:
        with tempfile.TemporaryDirectory(prefix="nlscale-bench-data-", dir=args.out) as folder:
            result = bench_data(
                text,
                list(dict.fromkeys(tokenizers)),
                workers,
                args.repeats,
                reading,
                Path(folder),
                args.directory,
            )
    except OSError as error:
        where = args.out or tempfile.gettempdir()
        raise UserError(f"cannot write {where}: {error}; name another --out") from error
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print_data(result)
    return 0
