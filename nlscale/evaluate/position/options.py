"""What `nlscale eval loss` takes. No torch is imported."""

from __future__ import annotations

import argparse

from nlscale.config.arguments import path, whole
from nlscale.evaluate.asking.sizes import lengths
from nlscale.generate.given import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--lengths",
        type=lengths,
        default=lengths("256,1k,4k"),
        metavar="256,1k,...",
        help="ends of the ranges of positions in the table, in tokens, 1k being 1,024; a context "
        "is as long as the last (default: 256,1k,4k). The curve of --figure and --json is of the "
        "same contexts, in ranges half an octave wide from 16 tokens on (16, 23, 32, 45, ...), "
        "which also end where those of the table do",
    )
    parser.add_argument(
        "--contexts",
        type=whole(least=1),
        default=16,
        metavar="N",
        help="how many contexts are read, spread over the text, or as many as it has (default: "
        "%(default)s)",
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--data",
        type=path,
        metavar="DIR",
        help="a data folder, whose held-out text is read (default: that of the run)",
    )
    text.add_argument(
        "--text",
        type=path,
        metavar="FILE",
        help="a file to read instead: text, or documents as `nlscale data build` takes them",
    )
    parser.add_argument(
        "--context",
        nargs="+",
        metavar="LEVEL.KEY=VALUE",
        help="have levels learn from what they read, beside those whose context has the objective "
        "ntp: keys of that, such as base.chunk=256 base.learning_rate=0.1. Each loss is that "
        "before anything was learned from its token",
    )
    parser.add_argument(
        "--learned",
        type=path,
        metavar="FILE",
        help="what levels with reset=never have learned: read, if it is there, and written at the "
        "end, to go on from",
    )
    add_tokenizer(parser)
