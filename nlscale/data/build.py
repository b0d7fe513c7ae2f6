"""Building a data folder: text in, webdataset shards of token ids and an index out.

Two passes over the text, each over units of it that processes share (`nlscale.data.building`). The
first counts, settles which documents are held out, and gathers the text a BPE is trained on;
nothing of an earlier build is removed before it has succeeded. The second writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nlscale.data.building import passes
from nlscale.data.building.asked import asked_of, beside_of, check
from nlscale.data.building.by_source import find_by_source, named_sources
from nlscale.data.building.options import Asked, Options
from nlscale.data.building.units import (
    any_plan,
    first_change,
    folder_fingerprint,
    read_plan,
    write_plan,
)
from nlscale.data.building.work import INDEX, SETTLED, Changed, Work, kept
from nlscale.data.folder import refuse_foreign_shards, remove_temporary, unwritable
from nlscale.data.index import BUILDING_NAME, DEFAULT_FIELD, INDEX_NAME, Index, read_index
from nlscale.data.losses import Losses
from nlscale.data.progress import say
from nlscale.data.shards import TokenShards
from nlscale.data.sources import Found, find_files, fingerprint
from nlscale.data.tally import shown
from nlscale.data.tokenizer import given_file
from nlscale.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of `typing` from Python 3.11 on


def build(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = False,
    **options: Unpack[Asked],
) -> Index:
    """Tokenize `sources` into the data folder `out`, and return its index.

    Args:
        sources: files, folders, or "stdlib" (see `nlscale.data.sources.find_files`)
        tokenizer: "bytes"; "bpe:N", which is trained on a sample of the train documents;
            "file:PATH/tokenizer.json", of another model or of other data; or a folder with one.
            Only with the last two are sources read that are tokens already
        overwrite: replace a build made from other sources or options
        workers: processes that share the units; what they build does not depend on how many
        progress: say on standard error how far it is
        options: fields of `nlscale.data.building.options.Options`, by their names

    When `out` was already built from the same files (names, sizes, modification times) and
    options, it is left as it is. A build that was killed goes on with the units that it had not
    finished; those that it had are compared with their checksums.

    Raises:
        UserError: wrong options, unreadable sources, no or too few documents, more of them lost
            than `max_lost`, an `out` that holds something else, sources that change meanwhile, and
            a disk that cannot be written.
        LostRank: a process was killed.
    """
    work = begun(sources, tokenizer, out, overwrite=overwrite, progress=progress, **options)
    return _run(work, workers, progress)[0]


def build_by_source(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int = 1,
    progress: bool = False,
    **options: Unpack[Asked],
) -> dict[str, Index]:
    """As `build`, into a data folder for each source, to be mixed; return their indexes by name.

    They have one tokenizer, a BPE trained on a sample of all of them; duplicates are dropped in the
    order of all sources, and each folder has both splits. It lies below `out` and is called by
    the last part of its source's path, without suffixes. A file that is named is a source.

    Raises:
        UserError: as `build`, of any of the sources; two would be called the same; one has nothing
            of its own, or no documents for both splits once duplicates are dropped; `out` is a
            data folder itself, or has something else where one is to be.
        LostRank: a process was killed.
    """
    named = named_sources(sources)
    work = begun(
        sources, tokenizer, out, by_source=True, overwrite=overwrite, progress=progress, **options
    )
    return dict(zip(named, _run(work, workers, progress), strict=True))


def begun(
    sources: Sequence[str],
    tokenizer: str,
    out: str | Path,
    *,
    by_source: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    **options: Unpack[Asked],
) -> Work | list[Index]:
    """What a build does before any text is read: what is to be built, or the indexes there are.

    What an earlier attempt has made of the same is kept. `by_source` is whether it is
    `build_by_source`; other arguments are those of `build`.

    Raises:
        UserError: as they do, of what is known before the text is read.
    """
    out = Path(out)
    asked_for = Options(sources=list(sources), tokenizer=tokenizer, by_source=by_source, **options)
    check(asked_for)
    founds = find_by_source(sources, out) if by_source else {"": find_files(sources, out)}
    files = [
        file._replace(name=f"{name}/{file.name}") if name else file
        for name, found in founds.items()
        for file in found.files
    ]
    asked, beside = asked_of(asked_for), beside_of(asked_for)
    identity = fingerprint(files, [*asked, beside] if beside else asked)
    there = {name: out / name for name in founds if (out / name / INDEX_NAME).exists()}
    whole = len(there) == len(founds)
    if not overwrite:
        # Builds of earlier versions do not name what lies beside the tokenizer.
        earlier = fingerprint(files, asked) if beside and not by_source else None
        indexes = {name: read_index(folder) for name, folder in there.items()}
        for name, index in indexes.items():
            identities = [folder_fingerprint(identity, name)]
            if earlier is not None and beside.items() <= index.items():
                identities.append(earlier)
            _refuse_another(there[name], index, identities)
        if whole:
            return _up_to_date(out, indexes, founds, asked_for.max_lost, progress)
    refuse_foreign_shards(out)
    for found in founds.values():
        losses = Losses(found, asked_for.text_field)
        losses.check_left_out(asked_for.max_lost)  # before hours of reading
    work, only_options = Work(out), fingerprint([], [*asked, beside])
    try:
        out.mkdir(parents=True, exist_ok=True)
        before = read_plan(work.folder)
        if before is None and any_plan(work.folder) and progress:
            say(
                f"starting over what an earlier build of {out} had begun: its plan is damaged, "
                "or of another version"
            )
        if before is not None and before.identity != identity and progress:
            changed = "it had other options"
            if before.asked == only_options:
                listed = chain.from_iterable(found.files for found in founds.values())
                changed = f"{first_change(work.folder, listed)} has changed since"
            say(f"starting over what an earlier build of {out} had begun: {changed}")
        # Indexes go before anything is settled: what has all of them is the rest of a finished one.
        left = whole and work.noted(SETTLED) is not None
        if before is None or before.identity != identity or left:
            work.discard()
        work.folder.mkdir(exist_ok=True)
        work.tidy()
        for name in founds:
            remove_temporary(out / name)
        if (path := given_file(tokenizer)) is not None:
            work.keep_tokenizer(path)
        write_plan(work.folder, identity, only_options, asked_for, founds)
    except OSError as error:
        raise unwritable(out, error) from error
    return work


def _run(work: Work | list[Index], workers: int, progress: bool) -> list[Index]:
    """Do what is left of what was begun."""
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be 1 or more")
    if not isinstance(work, Work):
        return work
    with kept(work), _nothing_left(work):
        return passes.run_all(work, workers, progress)


@contextmanager
def _nothing_left(work: Work) -> Iterator[None]:
    """Build in the block: where a small one is refused, nothing of it stays."""
    try:
        yield
    except Changed:
        raise
    except UserError:
        # Of one unit there is nothing to keep that would take long to make again.
        if len(work.plan.units) == 1 and work.noted(SETTLED) is None:
            work.discard()
            with contextlib.suppress(OSError):
                work.out.rmdir()
        raise


def _refuse_another(out: Path, index: Index, identities: Sequence[str]) -> None:
    """A UserError where a data folder was built from something else."""
    if index["fingerprint"] not in identities:
        fewer = "" if "left_out" in index else ", by a version that read fewer formats"
        named = shown(" ".join(index["sources"]))
        raise UserError(
            f"{out} was built from other sources or options ({named}, "
            f"{shown(index['tokenizer'])}){fewer}; choose another --out, or replace it with "
            "--overwrite"
        )


def _up_to_date(
    out: Path,
    indexes: Mapping[str, Index],
    founds: Mapping[str, Found],
    max_lost: float | None,
    progress: bool,
) -> list[Index]:
    """The indexes of data folders below `out`, after seeing that nothing lacks and not too much."""
    for name, index in indexes.items():
        for split in index["splits"]:
            TokenShards(out / name, split, verify=False)  # says so when a shard is missing
        found = founds[name]
        losses = Losses(found, index.get("text_field", DEFAULT_FIELD))
        if "left_out" in index:
            losses.check_left_out(max_lost)
        elif found.left_bytes:  # of a version that did not count it: nothing is built anew for it
            say(f"not in {out}: {found.left_out.words()}")
    work = Work(out)
    if work.noted(INDEX) is not None:  # killed when all was done but tidying up
        with contextlib.suppress(OSError):  # as where the folder can only be read
            work.discard()
            for name in indexes:
                (out / name / BUILDING_NAME).unlink(missing_ok=True)
    if progress:
        say(f"{out} is up to date")
    return list(indexes.values())
