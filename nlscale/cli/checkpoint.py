"""`nlscale checkpoint list|inspect|verify|diff|export|import`."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlscale.checkpoint import FOLDER
from nlscale.cli.arguments import path
from nlscale.cluster.life.owner import hold
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Dtype
from nlscale.data.tokenizer import TOKENIZER_NAME
from nlscale.errors import UserError
from nlscale.generate.imports import import_models
from nlscale.telemetry.files import to_json

if TYPE_CHECKING:  # torch is slow to import, and --help needs none
    from nlscale.checkpoint.store.store import Checkpoint

_ANY = "a run's folder, its folder of checkpoints, or one checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Hang the sub-parsers under `parser`; each sets `func(args) -> int`."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    listed = _verb(
        verbs,
        "list",
        "the checkpoints of a run",
        "List the checkpoints of a run: step, tokens, when they were written, size, and which one "
        "LATEST names. Of a URL: those of the mirror there.",
        _list,
    )
    listed.add_argument(
        "folder", type=_path_or_url, metavar="DIR", help=f"{_ANY}; or the URL of a mirror"
    )

    inspect = _verb(
        verbs,
        "inspect",
        "what a checkpoint holds",
        "Show what a checkpoint holds: progress, layout, versions, the levels with their windows, "
        "tensors, and the configuration where it is not the default. Of a run: the newest.",
        _inspect,
    )
    _add_folder(inspect)

    verify = _verb(
        verbs,
        "verify",
        "read every byte again and compare checksums",
        "Read every file of every checkpoint, or of the given one, and compare it with its sha256. "
        "Exit code 2 if one is broken.",
        _verify,
    )
    _add_folder(verify)

    diff = _verb(
        verbs,
        "diff",
        "how two checkpoints differ",
        "Compare two checkpoints, of any layouts, class by class: equal bit for bit, or the "
        "largest |a - b| / |b| of a tensor. Of a run: the newest.",
        _diff,
    )
    diff.add_argument("a", type=path, metavar="A", help=_ANY)
    diff.add_argument("b", type=path, metavar="B", help="the same; what A is compared with")

    export = _verb(
        verbs,
        "export",
        "write the weights as safetensors files, or as a folder of Hugging Face",
        "Write the weights of a checkpoint as Hugging Face lays them out: safetensors files and "
        "config.json. With --to huggingface also code, tokenizer and card, so that transformers "
        "loads the folder. `run.weights` starts a run from either. Of a run: the newest.",
        _export,
    )
    _add_folder(export)
    export.add_argument(
        "--to", required=True, choices=["safetensors", "huggingface"], help="the format"
    )
    export.add_argument(
        "--out",
        type=path,
        metavar="FOLDER",
        help="a folder that does not exist yet (default: export-step-N in the run's folder)",
    )
    export.add_argument(
        "--dtype",
        choices=[dtype.value for dtype in Dtype],
        help="of the weights (default: that in which the model was trained)",
    )
    export.add_argument(
        "--tokenizer",
        type=path,
        metavar="FOLDER",
        help="a data folder, or another with the tokenizer that the model was trained with, for "
        "--to huggingface (default: the run's data.dir)",
    )

    imported = _verb(
        verbs,
        "import",
        "make an export of a Llama or Qwen folder of Hugging Face",
        "Write a Transformer that transformers has saved (Llama, Qwen3: config.json and "
        "safetensors) as an export: `nlscale.load` reads it, and the recipe.yaml in it trains on "
        "from it. Nothing in the folder is run.",
        _import,
    )
    imported.add_argument("folder", type=path, metavar="DIR", help="a folder of Hugging Face")
    imported.add_argument(
        "--out", type=path, metavar="FOLDER", required=True, help="a folder that does not exist yet"
    )
    imported.add_argument(
        "--levels",
        default="1",
        metavar="PERIODS",
        help="of the levels that share the hidden units of each MLP, fastest first, such as 1,4,16 "
        "(default: %(default)s)",
    )


def find(path: Path) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints that a folder stands for, oldest first, at least one; names of unfinished.

    Args:
        path: a run's folder, its folder of checkpoints, or one checkpoint.

    Raises:
        UserError: it is none of these, or no checkpoint in it is finished.
    """
    from nlscale.checkpoint.inspection import unfinished
    from nlscale.checkpoint.store.store import Checkpoint, Store

    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give {_ANY}")
    named = re.fullmatch(r"step-(\d{8,})(\.\w+)?", path.resolve().name)
    if (path / "manifest.json").exists() or (named and not named[2]):
        step = int(named[1]) if named else Checkpoint(path, 0).manifest["step"]
        return [Checkpoint(path, step)], []
    if named:
        raise UserError(
            f"{path} is not a finished checkpoint: it is being written or deleted, or was when a "
            f"run was killed; give another, `nlscale checkpoint list {path.parent}` shows them"
        )
    inside = path / FOLDER
    store = Store(inside if inside.is_dir() else path)
    found, begun = store.checkpoints(), unfinished(store)
    if not found:
        raise UserError(
            f"no {'finished ' if begun else ''}checkpoint in {store.folder}"
            f"{' (unfinished: ' + ', '.join(begun) + ')' if begun else ''}; give {_ANY}, or train "
            f"with checkpoint.every set"
        )
    return found, begun


def _verb(verbs: Any, name: str, short: str, description: str, func: Any) -> Any:
    parser = verbs.add_parser(name, help=short, description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(func=func)
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="DIR", help=_ANY)


def _path_or_url(text: str) -> Path | str:
    """A `type` of argparse: a text with :// is the URL of a mirror."""
    return text if "://" in text else path(text)


def _list(args: argparse.Namespace) -> int:
    from nlscale.checkpoint.inspection import listing, print_listing

    if isinstance(args.folder, str):
        from nlscale.checkpoint.mirror.listing import mirror_listing
        from nlscale.checkpoint.mirror.remote import Remote

        _show(args, mirror_listing(Remote(args.folder)), print_listing)
        return 0
    _show(args, listing(*find(args.folder)), print_listing)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from nlscale.checkpoint.inspection import inspection, print_inspection

    _show(args, inspection(_newest(args.folder)), print_inspection)
    return 0


def _verify(args: argparse.Namespace) -> int:
    """JSON: `checkpoints`, each `path`, `step`, `whole` and `error`, None or what is wrong with
    which file; `broken`: how many."""
    from nlscale.checkpoint.store.store import CheckpointError

    checkpoints, _ = find(args.folder)
    verdicts = []
    for checkpoint in checkpoints:
        error = None
        try:
            checkpoint.verify()
        except CheckpointError as found:
            error = str(found)
        path, step = str(checkpoint.path), checkpoint.step
        verdicts.append({"path": path, "step": step, "whole": error is None, "error": error})
        if not args.json:  # at once: the next may take minutes
            print(f"broken: {error}" if error else f"whole:  {path}", flush=True)
    broken = sum(not verdict["whole"] for verdict in verdicts)
    if args.json:
        print(to_json({"checkpoints": verdicts, "broken": broken}, indent=1))
    else:
        print(f"{broken} of {len(verdicts)} broken")
    return 2 if broken else 0


def _diff(args: argparse.Namespace) -> int:
    from nlscale.checkpoint.inspection import difference, print_difference

    _show(args, difference(_newest(args.a), _newest(args.b)), print_difference)
    return 0


def _export(args: argparse.Namespace) -> int:
    """JSON: `checkpoint`, `step`, `folder`, `files` (of weights), `tensors`, `parameters`, `bytes`
    (of weights), `dtype`."""
    if args.tokenizer and args.to != "huggingface":
        raise UserError("--tokenizer is for --to huggingface; safetensors hold none")
    import_models()
    from nlscale.checkpoint.export.weights import default_folder, export

    checkpoint = _newest(args.folder)
    folder = args.out or default_folder(checkpoint)
    if folder.exists():  # before anything is held there
        raise UserError(f"{folder} exists; remove it or give another folder with --out")
    with hold(folder.parent, "nlscale checkpoint export", "another --out", name=folder.name):
        dtype = Dtype(args.dtype) if args.dtype else None
        if args.to == "huggingface":
            from nlscale.checkpoint.export.huggingface import export_huggingface

            written = export_huggingface(checkpoint, folder, dtype, args.tokenizer)
        else:
            written = export(checkpoint, folder, dtype)
    found = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, **asdict(written)}
    _show(args, {**found, "dtype": written.dtype.value}, _print_export)
    return 0


def _import(args: argparse.Namespace) -> int:
    """JSON: `folder`, `recipe`, `tokenizer` (None: the folder brought none), `files` (of weights),
    `tensors`, `parameters`, `bytes` (of weights), `dtype`."""
    from nlscale.checkpoint.export.from_llama import RECIPE_FILE, import_transformer

    if args.out.exists():  # before anything is held there
        raise UserError(f"{args.out} exists; remove it or give another folder with --out")
    periods = [period.strip() for period in args.levels.split(",")]
    with hold(args.out.parent, "nlscale checkpoint import", "another --out", name=args.out.name):
        written = import_transformer(args.folder, args.out, periods)
    found = {**asdict(written), "dtype": written.dtype.value}
    tokenizer = args.out / TOKENIZER_NAME
    found["tokenizer"] = str(tokenizer) if tokenizer.is_file() else None
    _show(args, {**found, "recipe": str(args.out / RECIPE_FILE)}, _print_import)
    return 0


def _print_import(found: dict[str, Any]) -> None:
    print(
        f"{human_count(found['parameters'])} parameters in {found['tensors']} tensors, "
        f"{found['dtype']}, {human_bytes(found['bytes'])}\n{found['folder']}\n"
        f"to train on from it: nlscale train {found['recipe']} data.dir=..."
    )
    if found["tokenizer"] is None:
        print(
            f"the folder has no {TOKENIZER_NAME}: for text, put one into {found['folder']}, or "
            f"name its folder with --tokenizer"
        )


def _print_export(found: dict[str, Any]) -> None:
    count = len(found["files"])
    print(
        f"step {found['step']:,}: {human_count(found['parameters'])} parameters in "
        f"{found['tensors']} tensors, {found['dtype']}, {human_bytes(found['bytes'])} in "
        f"{count} file{'s' * (count > 1)}\n{found['folder']}"
    )


def _newest(path: Path) -> Checkpoint:
    return find(path)[0][-1]


def _show(args: argparse.Namespace, found: dict[str, Any], as_text: Any) -> None:
    if args.json:
        print(to_json(found, indent=1))
    else:
        as_text(found)
