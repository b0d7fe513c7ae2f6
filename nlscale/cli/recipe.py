"""`nlscale recipe list|show|copy`: what lies in recipes/, by name."""

from __future__ import annotations

import argparse
from pathlib import Path

from nlscale.cli.arguments import path
from nlscale.config import shipped
from nlscale.config.schema import nearest
from nlscale.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang the sub-parsers under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = verbs.add_parser(
        "list",
        help="their names, and what each is",
        description="List the recipes, cluster, sweep and stream files that come with nlscale. "
        "Their names stand wherever a path does: nlscale train quickstart.",
    )
    listing.set_defaults(func=_list)
    show = verbs.add_parser("show", help="print one", description="Print one as it is.")
    show.set_defaults(func=_show)
    copy = verbs.add_parser(
        "copy",
        help="write one into a file of your own, to be changed",
        description="Write one into a new file; nothing is overwritten.",
    )
    copy.set_defaults(func=_copy)
    for one in (show, copy):
        one.add_argument(
            "name", metavar="NAME", help="as `nlscale recipe list` names it: clusters/two-nodes"
        )
    copy.add_argument(
        "out",
        type=path,
        nargs="?",
        metavar="FILE",
        help="default: the last part of the name with .yaml, in this folder",
    )


def _list(args: argparse.Namespace) -> int:
    names = shipped.everything()
    width = max(map(len, names))
    folder = ""
    for name in names:
        if (own := name.rpartition("/")[0]) != folder:
            folder = own
            print()
        print(f"{name:{width}}  {shipped.about(shipped.find(name))}")
    print(f"\nscripts that start runs, to read and copy: {shipped.SHIPPED / 'launch'}")
    return 0


def _show(args: argparse.Namespace) -> int:
    print(_text(args.name), end="")
    return 0


def _copy(args: argparse.Namespace) -> int:
    text = _text(args.name)
    out = args.out or Path(f"{args.name.rpartition('/')[2]}.yaml")
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out} exists; remove it or name another file") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    print(f"{args.name} is in {out} now")
    return 0


def _text(name: str) -> str:
    known = shipped.everything()
    if name not in known:
        raise UserError(
            f"nothing that comes with nlscale is called {name!r}; {nearest(name, known)}"
        )
    return shipped.find(name).read_text(encoding="utf-8")
