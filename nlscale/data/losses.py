"""What of the sources did not become documents, and whether that is too much to go on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nlscale.data.documents import (
    NO_COLUMN,
    NO_FIELD,
    Document,
    SourceFile,
    format_of,
    is_plain,
    of_programs,
)
from nlscale.data.formats.tokens import NO_TOKENIZER
from nlscale.data.index import LeftOut, LostFile, LostFiles, Skipped, SkippedDocument
from nlscale.data.sources import Found
from nlscale.data.tally import Tally, mib, shown
from nlscale.errors import UserError

DEFAULT_MAX_LOST = 0.01
_NAMED = 3
_KINDS = 50  # of suffixes there can be as many as files


@dataclass
class _Source:
    """What came of one source; a file that was lost halfway is in both tallies."""

    seen: int = 0
    """Files; those without any document, too."""
    files: int = 0
    documents: int = 0
    """Those that were lost among them."""
    lost: Tally = field(default_factory=Tally)
    lost_files: Tally = field(default_factory=Tally)


class Losses:
    """Counts, file after file.

    Args:
        found: what the sources hold; what turns out to be no data is added to what it leaves out
        text_field: what the text of a record is called
        judged_bytes: of the files of sources that must be readable; None: of those of `found`
    """

    def __init__(self, found: Found, text_field: str, judged_bytes: int | None = None) -> None:
        self._found = found
        self._judged_bytes = judged_bytes_of(found) if judged_bytes is None else judged_bytes
        self._text_field = text_field
        self._sources = [_Source() for _ in found.names]
        for group, tally in found.lost.items():
            self._sources[group].files += tally.count
            self._sources[group].lost_files.merge(tally)
        self._kept = self._kept_bytes = 0
        self._here = Tally()
        self._left_here = Tally()
        self._unread = 0
        """Bytes of the files that were found to be left out only when they were read."""

    @classmethod
    def of_a_part(cls, found: Found, text_field: str) -> Losses:
        """Those of some of the files, to be added to those of all that was found by `merge`."""
        nothing = Found()
        nothing.names, nothing.judged = found.names, found.judged
        return cls(nothing, text_field)

    def plain(self) -> dict[str, Any]:
        """Those of a part as JSON holds them."""
        sources = [
            [number, s.seen, s.files, s.documents, s.lost.plain(), s.lost_files.plain()]
            for number, s in enumerate(self._sources)
            if s.seen
        ]
        left = [self._found.left_out.plain(), self._found.left_bytes, self._unread]
        return {"sources": sources, "left": left}

    def merge(self, plain: dict[str, Any]) -> None:
        """Count those of the next part of the files, too."""
        for number, seen, files, documents, lost, lost_files in plain["sources"]:
            source = self._sources[number]
            source.seen += seen
            source.files += files
            source.documents += documents
            source.lost.merge(Tally.of(lost))
            source.lost_files.merge(Tally.of(lost_files))
        left_out, left_bytes, unread = plain["left"]
        self._found.left_out.merge(Tally.of(left_out))
        self._found.left_bytes += left_bytes
        self._unread += unread

    def any_file(self) -> bool:
        """Whether a file could not be read, or not to its end."""
        return any(source.lost_files.count for source in self._sources)

    def keep(self, size: int) -> None:
        """The next document of a file can be read, and has so many bytes."""
        self._kept += 1
        self._kept_bytes += size

    def lose(self, document: Document) -> None:
        """The next document of a file cannot be read, or is left out."""
        if document.left_out is not None:
            self._left_here.add(document.kind, document.name, document.error, document.left_out)
            return
        self._here.add(document.kind, document.name, document.error)

    def end(self, file: SourceFile, kind: str = "", why: str = "") -> None:
        """The file is at its end, or cannot be read on, for a reason."""
        source, kept, here = self._sources[file.group], self._kept, self._here
        left, self._left_here = self._left_here, Tally()
        # A compressed file is smaller than what is in it: of its bytes the same share is left out.
        held = left.bytes + (self._kept_bytes if format_of(file.path.name)[1] else 0)
        left.scale(file.size, max(file.size, held))
        self._found.left_out.merge(left)
        self._found.left_bytes += left.bytes
        self._kept, self._kept_bytes, self._here = 0, 0, Tally()
        source.seen += 1
        self._unread += left.bytes if self._found.judged[file.group] else 0
        path = str(file.path)
        if kind in of_programs(file.path.name):
            self._leave(file, why)
            return
        if kind:
            after = f", after document {kept:,}" if kept else ""
            source.lost_files.add(kind, path, why + after)
        elif not kept and not here.count:
            if not left.count:
                self._found.leave("empty", path)
            return
        elif not kept and not is_plain(file.path.name):
            self._none(file, here)
            return
        source.files += 1
        source.documents += kept + here.count
        source.lost.merge(here)

    def _none(self, file: SourceFile, here: Tally) -> None:
        """A file of records none of which can be read: lost, or settings of some program."""
        path, why = str(file.path), here.first[0][1]
        if here.kinds.keys() <= of_programs(file.path.name):
            self._leave(file, why)
            return
        source = self._sources[file.group]
        source.files += 1
        why = f"none of its {here.count:,} records can be read, the first because: {why}"
        source.lost_files.add("no readable record", path, why)

    def _leave(self, file: SourceFile, why: str) -> None:
        """A file is found to be none of text when it is read."""
        self._unread += file.size if self._found.judged[file.group] else 0
        self._found.leave(self._without(file.path.name), str(file.path), file.size, why)

    def _without(self, name: str) -> str:
        """The kind of a file of this name that is left out for what it lacks."""
        return f"{format_of(name)[0]} without {self._text_field!r}"

    def check(self, most: float | None) -> None:
        """See whether too much was lost.

        Args:
            most: the share of the documents of a source, of its files and of the bytes that may
                be lost; None: `DEFAULT_MAX_LOST`, and no file

        Raises:
            UserError: more was, or a source has nothing that can be read.
        """
        for name, judged, source in zip(
            self._found.names, self._found.judged, self._sources, strict=True
        ):
            name = shown(name)
            if source.seen and source.documents == source.lost.count:
                self._refuse(f"{name} holds no documents that can be read", source, None)
            if not judged:
                continue
            files, documents = source.lost_files.count, source.lost.count
            if files and (most is None or files / source.files > most):
                what = f"{name}: {files:,} of {source.files:,} files cannot be read"
                self._refuse(what, source, files / source.files)
            share = documents / max(1, source.documents)
            if share > (DEFAULT_MAX_LOST if most is None else most):
                what = f"{name}: {documents:,} of {source.documents:,} documents cannot be read"
                self._refuse(what, source, share)
        self.check_left_out(most)

    def check_left_out(self, most: float | None) -> None:
        """See whether too much is left out for its suffix; `most` as in `check`. UserError: yes."""
        found, left = self._found, self._found.left_bytes
        read = self._judged_bytes - self._unread
        share = left / max(1, left + read)
        if share > (DEFAULT_MAX_LOST if most is None else most):
            which = f"{found.left_out.words()}, such as {_largest(found.left_out)}"
            raise UserError(
                f"{mib(left)} of the {mib(left + read)} in the sources are in files that are not "
                f"read ({_percent(share)}): {which}; "
                f"{self._remedy(found.left_out)}convert or move them, or leave them out with "
                f"--max-lost {_round_up(share)}"
            )

    def _refuse(self, what: str, source: _Source, share: float | None) -> None:
        lost = Tally()
        lost.merge(source.lost_files)
        lost.merge(source.lost)
        if share is None:
            lost.merge(self._found.left_out)
            remedy = "name sources with text"
        else:
            what += f" ({_percent(share)})"
            remedy = (
                f"mend or remove them, or go on without them with --max-lost {_round_up(share)}"
            )
        raise UserError(f"{what}: {lost.words()}{_named(lost)}; {self._remedy(lost)}{remedy}")

    def _remedy(self, lost: Tally) -> str:
        """What helps where the text has another name."""
        kinds = {NO_FIELD, NO_COLUMN, "no readable record"}
        kinds |= {self._without(name) for kind in lost.kinds.values() for name, _ in kind.first}
        helps = (
            "name the field of the text with --text-field, " if kinds & lost.kinds.keys() else ""
        )
        if NO_TOKENIZER in lost.kinds:
            helps += "name the --tokenizer that made the tokens (file:PATH/tokenizer.json), "
        return helps

    def skipped(self) -> Skipped:
        """The `skipped` of the index."""
        lost = self._all("lost")
        return Skipped(
            count=lost.count,
            first=[SkippedDocument(document=name, reason=why) for name, why in lost.first],
            reasons={name: kind.count for name, kind in lost.largest(_KINDS)},
        )

    def lost_files(self) -> LostFiles:
        """The `lost_files` of the index."""
        lost = self._all("lost_files")
        return LostFiles(
            count=lost.count,
            of=sum(source.files for source in self._sources),
            first=[LostFile(file=name, reason=why) for name, why in lost.first],
            reasons={name: kind.count for name, kind in lost.largest(_KINDS)},
        )

    def left_out(self) -> list[LeftOut]:
        """The `left_out` of the index."""
        return [
            LeftOut(
                reason=name,
                count=kind.count,
                bytes=kind.bytes,
                first=[path for path, _ in kind.first[:_NAMED]],
            )
            for name, kind in self._found.left_out.largest(_KINDS)
        ]

    def _all(self, name: str) -> Tally:
        total = Tally()
        for source in self._sources:
            total.merge(getattr(source, name))
        return total


def judged_bytes_of(found: Found) -> int:
    """Bytes of the files of sources that must be readable."""
    return sum(file.size for file in found.files if found.judged[file.group])


def _named(tally: Tally) -> str:
    """The first few, and why."""
    first = "; ".join(f"{shown(name)}: {shown(why)}" for name, why in tally.first[:_NAMED])
    return f", such as {first}" if first else ""


def _largest(tally: Tally) -> str:
    """The first few of the kind that has most bytes."""
    kind, entry = tally.largest(1)[0]
    return "; ".join(
        shown(name) + (f": {shown(why)}" if why != kind else "")
        for name, why in entry.first[:_NAMED]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _round_up(share: float) -> float:
    """A share of two digits that is not below this one."""
    return min(1.0, math.ceil(share * 100) / 100)
