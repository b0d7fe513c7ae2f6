"""What `nlscale eval needle` takes. No torch is imported."""

from __future__ import annotations

import argparse

from nlscale.config.arguments import path, whole
from nlscale.config.schema import nearest
from nlscale.data.needles.kinds import FORMS, KINDS
from nlscale.errors import UserError
from nlscale.evaluate.asking.sizes import lengths
from nlscale.evaluate.instruments.options import factors
from nlscale.generate.given import add_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--kinds",
        type=_kinds,
        metavar="KIND,...",
        help="of questions: "
        + "; ".join(f"{name}, {kind.about}" for name, kind in KINDS.items())
        + " (default: those that the model was trained on, else all)",
    )
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default="1x,2x,4x",
        metavar="1x,4k,...",
        help="tokens of a prompt with its answer, 1k being 1,024, or how many times as many as in "
        "training, 4x (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=whole(least=1, most=1 << 20),
        default=20,
        metavar="N",
        help="of each kind and length, at depths spread evenly (default: %(default)s)",
    )
    parser.add_argument(
        "--depths",
        type=whole(least=1, most=40),
        default=5,
        metavar="N",
        help="ranges of depth that are told apart (default: %(default)s)",
    )
    parser.add_argument(
        "--haystack",
        type=path,
        metavar="FILE|DIR",
        help="a text file, or a data folder, whose held-out text it is (default: that of the "
        "model's data)",
    )
    parser.add_argument(
        "--form",
        choices=list(FORMS),
        help="the words around a question: ruler, those of RULER; short, next to none (default: as "
        "the model was trained, else ruler where the shortest length has room for it)",
    )
    parser.add_argument(
        "--seed", type=whole(least=0), default=0, metavar="N", help="(default: %(default)s)"
    )
    add_tokenizer(parser)


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in KINDS:
            raise argparse.ArgumentTypeError(
                f"no kind of needle is called {name!r}; {nearest(name, KINDS)}"
            )
    return list(dict.fromkeys(names))


def _lengths(text: str) -> str:
    tokens(text, 1)
    return text


def tokens(text: str, trained: int) -> list[int]:
    """Lengths such as 1x,4x or 512,2k, in tokens, ascending.

    Args:
        text: as it was typed.
        trained: tokens of a sample of training.

    Raises:
        argparse.ArgumentTypeError: it is no such list.
    """
    found: set[int] = set()
    for part in (part.strip() for part in text.split(",")):
        try:
            found |= {factors(part)[0] * trained} if part.endswith("x") else {lengths(part)[0]}
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of lengths; write such as 1x,4x or 512,2k (1k is 1,024)"
            ) from None
    return sorted(found)


def only_factors(text: str) -> list[int]:
    """Lengths such as 1x,4x, of a task whose examples are multiples of those of training.

    Raises:
        UserError: one is in tokens.
    """
    try:
        return factors(text)
    except argparse.ArgumentTypeError:
        raise UserError(
            f"--lengths {text}: the model was trained on a task of symbols, whose examples are as "
            f"long or several times as long; write such as 1x,4x"
        ) from None
