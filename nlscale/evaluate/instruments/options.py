"""What `nlscale eval recall`, `automata`, `mad` and `babi` take. No torch is imported."""

from __future__ import annotations

import argparse

from nlscale.config.arguments import path, whole

_LONGEST = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--lengths",
        type=factors,
        default=[1, 2, 4],
        metavar="1x,2x,...",
        help="how many times longer than those of training the examples are (default: 1x,2x,4x)",
    )
    parser.add_argument(
        "--examples",
        type=whole(least=1),
        default=256,
        metavar="N",
        help="of each length (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=path,
        metavar="DIR",
        help="the data folder of the task, where it is not where the run had it",
    )


def factors(text: str) -> list[int]:
    """A `type` of argparse: such as 1x,2x,4x."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [part.removesuffix("x") for part in parts if part.endswith("x")]
    if len(numbers) < len(parts) or not all(
        n.isascii() and n.isdecimal() and 1 <= int(n) <= _LONGEST for n in numbers
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of lengths; write such as 1x,2x,4x, each from 1x to {_LONGEST}x"
        )
    return [int(n) for n in numbers]
