"""`nlscale data info|verify|sample`: looking into data folders that are built."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nlscale.cli.arguments import figure, path, whole
from nlscale.cli.data_show import console, show, show_folders, show_lengths
from nlscale.config.units import human_bytes
from nlscale.config.urls import Location, is_url
from nlscale.data.index import INDEX_NAME, SPLITS, read_index
from nlscale.data.tally import shown
from nlscale.errors import UserError

if TYPE_CHECKING:
    from nlscale.config.vocabulary import CacheConfig
    from nlscale.data.look.sample import Sample
    from nlscale.data.tokenizer import Tokenizer

_SAMPLE_TOKENS = 512
"""Of a sample, where neither a recipe nor the data say how many."""
_MASKED = "\u27e8", "\u27e9"
"""Around what does not count, where it cannot be dim."""
_BORDER = "\u2500" * 4


def add_arguments(verbs: Any) -> None:
    """Hang the sub-parsers under `verbs`; each sets `func(args) -> int`."""
    info = verbs.add_parser(
        "info",
        help="show what data folders hold",
        description="Show what data folders hold, by source and by length of the documents, after "
        "checking that no shard is missing; of several, a table.",
    )
    info.add_argument(
        "directories",
        nargs="+",
        type=_folder,
        metavar="DIR",
        help="folders made by build, or URLs of such",
    )
    info.add_argument(
        "--no-lengths",
        action="store_true",
        help="do not read all tokens to see how long the documents are (behind a URL they are "
        "never read for it)",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    info.add_argument(
        "--figure",
        type=figure,
        metavar="FILE",
        help="draw lengths of documents and tokens by source too: .png, .svg, .pdf",
    )
    _add_workers(info)
    info.set_defaults(func=_info)

    verify = verbs.add_parser(
        "verify",
        help="read every byte of a data folder again, and compare it with its index",
        description="Read every byte of a data folder again and compare it with its index: sizes "
        "and sha256 of all shards, ids within the vocabulary, as many separators as documents, "
        "masks, the tokenizer. Exit code 1 if something is wrong, which is named.",
    )
    verify.add_argument("directory", type=_folder, metavar="DIR", help="a folder made by build")
    _add_workers(verify)
    verify.set_defaults(func=_verify)
    _add_sample(verbs)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=whole(least=1, most=4096),
        metavar="N",
        help="threads that read shards side by side (default: the cores)",
    )


def _add_sample(verbs: Any) -> None:
    sample = verbs.add_parser(
        "sample",
        help="show decoded samples, as training reads them",
        description="Show the first samples that a run reads, decoded. A line stands where a "
        "document ends; what does not count as a target is dim, or between \u27e8 and \u27e9 "
        "where the output is no terminal; control characters are escaped.",
    )
    sample.add_argument(
        "data", type=_folder, metavar="DIR|RECIPE", help="a folder made by build; or a recipe"
    )
    sample.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override a key of the recipe"
    )
    sample.add_argument(
        "-n", type=whole(least=1), default=3, metavar="N", help="samples (default: %(default)s)"
    )
    sample.add_argument(
        "--split",
        choices=SPLITS,
        default=SPLITS[0],
        help="train, in the order of a run (default); or validation, as it lies there",
    )
    sample.add_argument(
        "--seed",
        type=whole(),
        metavar="N",
        help="the run.seed whose order it is (default: the recipe's; of a folder 0)",
    )
    sample.add_argument(
        "--sequence-length",
        type=whole(least=1),
        metavar="S",
        help=f"tokens of a sample (default: the recipe's; of a folder what it is packed for or its "
        f"examples have, or {_SAMPLE_TOKENS})",
    )
    sample.add_argument(
        "--raw",
        action="store_true",
        help="print the text alone, with nothing marked and nothing escaped",
    )
    sample.set_defaults(func=_sample)


def _folder(text: str) -> Location:
    return text.rstrip("/") if is_url(text) else path(text)


def _info(args: argparse.Namespace) -> int:
    from nlscale.data.look.facts import facts_of

    directories = list(dict.fromkeys(args.directories))
    folders = facts_of(directories, not args.no_lengths, args.workers, progress=True)
    if len(folders) > 1 or args.figure is not None:
        for facts in folders:
            if missing := [name for name in SPLITS if name not in facts["splits"]]:
                where = facts["directory"]
                raise UserError(f"{where} has no split {missing[0]}; show it by itself")
    if args.json:
        print(json.dumps({"folders": folders}, indent=1))
    elif len(folders) > 1:
        show_folders(console(), folders)
    else:
        show(console(), directories[0], read_index(directories[0]))
        show_lengths(console(), folders[0])
    if args.figure is not None:
        from nlscale.telemetry.data_figure import draw_data

        print(f"figure: {draw_data(folders, args.figure)}", file=sys.stderr)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from nlscale.data.look.verify import verify_data

    if is_url(args.directory):
        raise UserError(
            "data verify reads folders of this machine; shards behind a URL are compared with "
            "their sha256 whenever they are fetched"
        )
    verdict = verify_data(args.directory, args.workers, progress=True)
    out = console()
    for line in verdict.wrong:
        out.print(shown(line))
    read = (
        f"{verdict.shards:,} shards, {human_bytes(verdict.bytes)}, {verdict.tokens:,} tokens of "
        f"{shown(str(args.directory))}"
    )
    if verdict.wrong:
        out.print(f"{len(verdict.wrong):,} wrong of {read}; restore it, or build the data again")
        return 1
    out.print(f"whole: {read}")
    return 0


def _sample(args: argparse.Namespace) -> int:
    from nlscale.data.look.sample import samples_of
    from nlscale.data.shards import TokenShards
    from nlscale.data.tokenizer import load_tokenizer

    directory, cache = args.data, None
    seed, length = args.seed or 0, args.sequence_length
    if not is_url(directory) and not (Path(directory) / INDEX_NAME).exists():
        directory, cache, its_seed, its_length = _of_recipe(args)
        seed, length = its_seed if args.seed is None else args.seed, length or its_length
    elif args.overrides:
        raise UserError(f"{args.overrides[0]} overrides a recipe, and {directory} is a data folder")
    shards = TokenShards(directory, args.split, verify=False, cache=cache)
    if length is None:
        its = shards.index.get("packed") or shards.index.get("task")
        length = its["length"] if its else _SAMPLE_TOKENS
    tokenizer = load_tokenizer(directory)
    out = console()
    for sample in samples_of(shards, length, seed, args.n):
        if args.raw:
            print(tokenizer.decode(sample.ids))
        else:
            _show_sample(out, sample, tokenizer, f"{args.split} of {directory}", length)
    return 0


def _of_recipe(args: argparse.Namespace) -> tuple[Location, CacheConfig, int, int]:
    """Where the data of a recipe are, how they are fetched, its seed and its sequence length."""
    from nlscale.config import recipe

    config = recipe.load(str(args.data), args.overrides, trusted=True).config
    folders = config.data.folders()
    if len(folders) > 1:
        raise UserError(f"{args.data} mixes several folders; name one of {', '.join(folders)}")
    return folders[0], config.data.cache, config.run.seed, config.data.sequence_length


def _show_sample(
    out: Console, sample: Sample, tokenizer: Tokenizer, where: str, length: int
) -> None:
    first = sample.sample * length
    out.print(
        Text(
            f"sample {sample.number}: tokens {first:,} to {first + len(sample.ids) - 1:,} of "
            f"{shown(where)}",
            style="bold",
        )
    )
    line = Text()
    for piece in sample.pieces(tokenizer.separator):
        if piece.border:
            many = f"{len(piece.ids):,} separators" if len(piece.ids) > 1 else "a document ends"
            count = "" if piece.counts else ", does not count"
            if line:
                out.print(line)
            out.print(
                Text(f"\u2500\u2500\u2500\u2500 {many} (token {piece.start:,}{count})", "cyan")
            )
            line = Text()
            continue
        text = "\n".join(
            shown(part, sys.maxsize) for part in tokenizer.decode(piece.ids).split("\n")
        )
        if piece.counts:
            line.append(text)
        elif out.is_terminal:
            line.append(text, "dim")
        else:
            line.append(text.join(_MASKED))
    if line:
        out.print(line)
    out.print()
