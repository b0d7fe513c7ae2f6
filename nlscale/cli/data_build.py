"""`nlscale data build` and `nlscale data share`."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nlscale.cli.arguments import add_cluster, number, path, size, whole
from nlscale.cli.data_show import console, show, show_by_source
from nlscale.cluster.life.owner import hold
from nlscale.cluster.life.signals import handled
from nlscale.data.index import (
    DEFAULT_BPE_SAMPLE,
    DEFAULT_FIELD,
    DEFAULT_HELD_OUT,
    DEFAULT_SHARD_TOKENS,
    INDEX_NAME,
    Index,
)
from nlscale.data.tasks import PREFIX
from nlscale.errors import Stopped, UserError

_HOLDER = "nlscale data build"
"""What a process that builds calls itself."""


def add_arguments(verbs: Any) -> None:
    """Hang the sub-parsers under `verbs`; each sets `func(args) -> int`."""
    build = verbs.add_parser(
        "build",
        help="tokenize text into shards",
        description="Tokenize text, or draw the examples of a task, into webdataset shards and an "
        "index. Running it again with the same sources and options does nothing; a build that was "
        "killed goes on.",
    )
    build.add_argument(
        "--source",
        nargs="+",
        action="extend",
        type=_source,
        required=True,
        metavar="PATH",
        help="files or folders (.txt .rst .md .py: one document a file; .jsonl .ndjson .json .csv "
        "and .parquet: the field or column 'text'; .tar: samples of webdataset; all but .parquet "
        "also with .gz .zst .bz2 .xz; tokens: .bin of Megatron, .ds of datatrove, .npy), or "
        "stdlib: the Python standard library's own text, or one task by itself, such as "
        "'task:mqar(length=64, pairs=8)'; `--source task:` lists the tasks",
    )
    build.add_argument(
        "--tokenizer",
        metavar="bytes|bpe:N|file:JSON|FOLDER",
        help="of text, which needs one. bytes: UTF-8 bytes, vocabulary 256; bpe:N: a byte-level "
        "BPE of N ids, trained on the source text; file:PATH/tokenizer.json: of Hugging Face; a "
        "folder: the tokenizer.json in it, of a model or of other data. Tokens are read with one "
        "of the last two, which has made them",
    )
    build.add_argument(
        "--by-source",
        action="store_true",
        help="make a data folder of each source, to be mixed: DIR/NAME, called by the last part "
        "of its path, a file without its suffixes. They have one tokenizer, and duplicates are "
        "dropped across them",
    )
    build.add_argument(
        "--separator",
        metavar="TOKEN",
        help="the token of a given tokenizer that ends a document (default: <|endoftext|>, or the "
        "eos_token of the tokenizer_config.json beside it)",
    )
    build.add_argument(
        "--vocabulary-multiple",
        type=whole(least=1),
        metavar="N",
        help="round the vocabulary up to a multiple, such as 128, with ids that never occur",
    )
    build.add_argument(
        "--bpe-sample",
        type=size,
        default=DEFAULT_BPE_SAMPLE,
        metavar="SIZE",
        help="the most text to train a BPE on, such as 256MiB, in characters (default: 64MiB)",
    )
    build.add_argument("--out", type=path, metavar="DIR", help="the data folder to make")
    build.add_argument(
        "--held-out",
        type=number(),
        default=DEFAULT_HELD_OUT,
        metavar="F",
        help="share of the documents, or examples, kept for validation (default: %(default)s)",
    )
    build.add_argument(
        "--examples",
        type=whole(least=2),
        metavar="N",
        help="of a task, both splits together (default: 10000)",
    )
    build.add_argument(
        "--seed",
        type=whole(),
        default=0,
        metavar="N",
        help="of a task's examples; of which documents are held out (default: %(default)s)",
    )
    build.add_argument(
        "--shard-tokens",
        type=whole(),
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="the most tokens in one shard file (default: %(default)s)",
    )
    build.add_argument(
        "--text-field",
        default=DEFAULT_FIELD,
        metavar="NAME|TEMPLATE",
        help="the field or column that holds the text, or a template of several, such as "
        "'{title}\\n\\n{text}' (default: %(default)s)",
    )
    build.add_argument(
        "--max-lost",
        type=number(),
        metavar="SHARE",
        help="go on although up to this share of the documents of a source, of its files, or of "
        "the bytes in files of other suffixes is not read (default: 0.01, and no file that cannot "
        "be read)",
    )
    build.add_argument(
        "--pack",
        type=whole(least=2),
        metavar="S",
        help="pack documents whole into samples of S tokens, for runs of data.sequence_length S "
        "(default: they follow one another, for any length)",
    )
    build.add_argument(
        "--duplicates",
        choices=("keep", "drop"),
        default="keep",
        help="of documents whose text came before, exactly: keep them (default), or drop all but "
        "the first, in the order of the sources",
    )
    build.add_argument(
        "--overwrite",
        action="store_true",
        help="build anew, replacing what DIR holds from an earlier build",
    )
    _add_places(build)
    build.set_defaults(func=_build)

    share = verbs.add_parser(
        "share",
        help="what a task of `build --executor slurm` does",
        description="Do a share of a build that `nlscale data build --executor slurm` has begun. "
        "Its jobs run this; it can be run by hand to see why one fails.",
    )
    share.add_argument("directory", type=path, metavar="DIR", help="the data folder that is built")
    share.add_argument("step", metavar="STEP", help="survey, settle, tokens or finish")
    for option, what in (("--task", "which share, from 1"), ("--of", "how many shares")):
        share.add_argument(
            option, type=whole(least=1), default=1, metavar="N", help=f"{what} (default: 1)"
        )
    share.add_argument(
        "--workers",
        type=whole(least=1, most=4096),
        default=1,
        metavar="N",
        help="processes (default: 1)",
    )
    share.set_defaults(func=_share)


def _add_places(build: argparse.ArgumentParser) -> None:
    """Where text is built: in processes of this machine, or on others."""
    build.add_argument(
        "--workers",
        type=whole(least=1, most=4096),
        metavar="N",
        help="processes that build text side by side (default: the cores; with --executor slurm 1 "
        "a task); what they build does not depend on how many",
    )
    build.add_argument(
        "--unit-mib",
        type=whole(least=1, most=1 << 30),
        metavar="N",
        help="about how much of the sources a process takes at a time, and what a kill costs; "
        "shards end where a unit does, so it changes where they are cut (default: 256, more of "
        "sources above 1 TiB)",
    )
    build.add_argument(
        "--executor",
        choices=("local", "slurm"),
        default="local",
        help="of text. local: this machine (default); slurm: arrays of jobs",
    )
    add_cluster(build, "the machines of --executor slurm")
    build.add_argument(
        "--tasks",
        type=whole(least=1, most=1 << 20),
        metavar="N",
        help="tasks of each array of jobs",
    )


def _source(text: str) -> str:
    """As it was typed, where that is no name of a home: ./stdlib is a folder, stdlib is not."""
    found = path(text)
    return str(found) if text.startswith("~") else text


def _build(args: argparse.Namespace) -> int:
    started = time.monotonic()
    tasks = [source for source in args.source if source.startswith(PREFIX)]
    if tasks == [PREFIX]:
        return _list_tasks()
    if args.out is None:
        raise UserError("no --out; name the data folder to make")
    folders = _folders(args) if args.by_source and not tasks else [args.out]
    with _owned(args.out, folders, args.overwrite):
        built = [_build_task(args)] if tasks else _build_text(args)
    if built is None:
        return 0
    out = console()
    if args.by_source:
        show_by_source(out, dict(zip(folders, built, strict=True)))
    else:
        show(out, args.out, built[0])
    out.print(f"{time.monotonic() - started:.1f} seconds")
    return 0


def _folders(args: argparse.Namespace) -> list[Path]:
    """The data folders of the sources, below that which is named."""
    from nlscale.data.building.by_source import named_sources

    return [args.out / name for name in named_sources(args.source)]


def _build_text(args: argparse.Namespace) -> list[Index] | None:
    """Build it, or submit what builds it: None. The index of each data folder."""
    # pyarrow and the tokenizers are slow to import
    from nlscale.cluster.launch.data_build import running
    from nlscale.data.build import begun, build, build_by_source
    from nlscale.data.building.options import UNIT_BYTES
    from nlscale.data.building.work import Work

    if args.tokenizer is None:
        raise UserError(
            "no --tokenizer; use bytes, or bpe:N such as bpe:32000, or file:PATH/tokenizer.json, "
            "or a folder with one"
        )
    if args.examples is not None:
        raise UserError("--examples is for tasks, and the sources are text; leave it out")
    slurm = args.executor == "slurm"
    for option in ("cluster", "tasks"):
        if slurm != (getattr(args, option) is not None):
            how = "needs" if slurm else "is what takes"
            raise UserError(f"--executor slurm {how} --{option}")
    if (now := running(args.out)) is not None:
        if slurm:
            print(now)
            return None
        raise UserError(now)
    cores = 1 if slurm else len(os.sched_getaffinity(0))
    asked = {
        "held_out": args.held_out,
        "shard_tokens": args.shard_tokens,
        "seed": args.seed,
        "text_field": args.text_field,
        "separator": args.separator,
        "vocabulary_multiple": args.vocabulary_multiple,
        "bpe_sample": args.bpe_sample,
        "duplicates": args.duplicates,
        "pack": args.pack,
        "max_lost": args.max_lost,
        "overwrite": args.overwrite,
        "unit_bytes": args.unit_mib << 20 if args.unit_mib else UNIT_BYTES,
        "progress": True,
    }
    workers = args.workers or cores
    what = (args.source, args.tokenizer, args.out)
    if not slurm and args.by_source:
        return list(build_by_source(*what, workers=workers, **asked).values())
    if not slurm:
        return [build(*what, workers=workers, **asked)]
    from nlscale.cluster.launch.data_build import submit_build
    from nlscale.cluster.machines import load_cluster

    cluster = load_cluster(args.cluster)
    work = begun(*what, by_source=args.by_source, **asked)
    if not isinstance(work, Work):
        return work
    submit_build(work, cluster, args.tasks, workers)
    return None


def _share(args: argparse.Namespace) -> int:
    from nlscale.data.building.share import SHARED, share

    work = (args.directory, args.step, args.task, args.of, args.workers)
    # Slurm warns before the time is up: what is finished is kept, and the task is requeued.
    with handled((signal.SIGTERM, signal.SIGUSR1), _stop):
        if args.step in SHARED:
            share(*work)
            return 0
        with hold(args.directory, _HOLDER, instead="another --out", name="build", waits=True):
            share(*work)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise Stopped(f"stopped ({name}); units that are finished are kept, and the same goes on")


def _build_task(args: argparse.Namespace) -> Index:
    from nlscale.data.tasks.build import DEFAULT_EXAMPLES, build_task

    if len(args.source) > 1:
        raise UserError("a task is a source by itself; build a folder for each source")
    of_text = {
        "--tokenizer": args.tokenizer is not None,
        "--separator": args.separator is not None,
        "--vocabulary-multiple": args.vocabulary_multiple is not None,
        "--bpe-sample": args.bpe_sample != DEFAULT_BPE_SAMPLE,
        "--text-field": args.text_field != DEFAULT_FIELD,
        "--max-lost": args.max_lost is not None,
        "--duplicates": args.duplicates != "keep",
        "--pack": args.pack is not None,
        "--by-source": args.by_source,
        "--executor": args.executor != "local",
        "--workers": args.workers is not None,
        "--unit-mib": args.unit_mib is not None,
    }
    if given := [option for option, there in of_text.items() if there]:
        raise UserError(f"{given[0]} is for text, and the source is a task; leave it out")
    return build_task(
        args.source[0],
        args.out,
        examples=DEFAULT_EXAMPLES if args.examples is None else args.examples,
        held_out=args.held_out,
        shard_tokens=args.shard_tokens,
        seed=args.seed,
        overwrite=args.overwrite,
        progress=True,
    )


def _list_tasks() -> int:
    from nlscale.data.tasks.table import listing

    for task, about in listing():
        print(f"{task}\n    {about}")
    return 0


@contextmanager
def _owned(out: Path, folders: list[Path], overwrite: bool) -> Iterator[None]:
    """Hold the folder, unless it is no folder, or all is built already and so only looked at.

    Args:
        out: to be held.
        folders: the data folders that are built: it, or some in it.
        overwrite: whether they are built anew.
    """
    built = all((folder / INDEX_NAME).exists() for folder in folders)
    looked_at = built and not overwrite
    if looked_at or (out.exists() and not out.is_dir()):
        yield
        return
    with hold(out, _HOLDER, instead="another --out", name="build"):
        yield
