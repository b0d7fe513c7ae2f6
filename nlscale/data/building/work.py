"""What a build has made of each unit so far: folders that have their names once they are whole.

.units/plan.json, files.jsonl    what is to be built (`nlscale.data.building.units`)
.units/tokenizer.json            what --tokenizer names, and the tokenizer_config.json beside it
.units/survey-00007/             what a pass has made of unit 7: `result.json` and other files
.units/settled.json              the data folders were cleared, and the tokenizer lies there
.units/index.json                all is written, and shards get their names in the data folders
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from nlscale.data.building.units import Plan, Unit, files_of, forget_plan, read_plan
from nlscale.data.documents import SourceFile
from nlscale.data.folder import unwritable
from nlscale.data.hashed import HashedFile, sha256_of, sync_folder
from nlscale.data.index import UNITS_NAME, write_json
from nlscale.data.tokenizer import SETTINGS_NAME, TOKENIZER_NAME, Tokenizer, read_tokenizer
from nlscale.errors import UserError

SURVEY, DUPLICATES, TOKENS = "survey", "duplicates", "tokens"
"""Passes by unit."""
SETTLED, INDEX = "settled.json", "index.json"
_RESULT = "result.json"
_PARTIAL = ".partial"
Result = dict[str, Any]
"""What is known of a unit, as JSON; `files` has size and sha256 of those beside it, by name."""


class Changed(UserError):
    """What a build has made is not of the sources as they are.

    `unit` is the one whose survey is to be made again, and what follows from it; None: there is
    nothing to go on from.
    """

    def __init__(self, message: str, unit: int | None = None) -> None:
        super().__init__(message, unit)
        self.unit = unit

    def __str__(self) -> str:
        return str(self.args[0])


class Work:
    """The units of the data folder `out`, or of those that lie in it, while they are built.

    Args:
        out: the data folder, or that which holds one of each source.
        token: of this attempt, the same in all of its processes; None: a new one.
    """

    def __init__(self, out: Path, token: str | None = None) -> None:
        self.out, self.folder = out, out / UNITS_NAME
        self.token = token or uuid.uuid4().hex

    @cached_property
    def plan(self) -> Plan:
        """What is to be built. Raises UserError: there is none."""
        plan = read_plan(self.folder)
        if plan is None:
            raise UserError(f"nothing is being built at {self.out}; begin with nlscale data build")
        return plan

    def keep_tokenizer(self, path: Path) -> None:
        """Keep a copy of a tokenizer.json, and of what lies beside it. Raises OSError.

        The passes may be hours later, in the queue of a cluster.
        """
        for name, source in (
            (TOKENIZER_NAME, path),
            (SETTINGS_NAME, path.with_name(SETTINGS_NAME)),
        ):
            (self.folder / name).unlink(missing_ok=True)
            if source.is_file():
                shutil.copyfile(source, self.folder / name)

    def given(self) -> Tokenizer | None:
        """The tokenizer that a file describes, loaded once; None: it is bytes, or trained.

        Raises UserError: the copy of the file has gone.
        """
        options = self.plan.options
        if not options.given:
            return None
        chosen = (options.separator, options.vocabulary_multiple)
        return _given(self.folder / TOKENIZER_NAME, *chosen, self.plan.identity)

    @property
    def folders(self) -> list[Path]:
        """The data folders that are built, by number."""
        return [self.out / folder["name"] for folder in self.plan.folders]

    def files(self, unit: Unit) -> list[SourceFile]:
        """Those of a unit, in their order. Raises OSError."""
        return list(files_of(self.folder, unit))

    def path(self, kind: str, number: int) -> Path:
        """Where the folder of a unit is, when it is whole."""
        return self.folder / f"{kind}-{number:05d}"

    @contextmanager
    def making(self, kind: str, number: int) -> Iterator[Making]:
        """Make the folder of a unit: it has its name when the block is left. Raises OSError."""
        path = self.path(kind, number)
        partial = path.with_name(f"{path.name}.{self.token}{_PARTIAL}")
        try:
            if partial.exists():  # of a worker of this attempt that was killed
                shutil.rmtree(partial)
            partial.mkdir()
            making = Making(partial, self.plan.identity)
            yield making
            making.close()
            if path.exists():
                shutil.rmtree(path)  # it did not stand up to being checked
            os.rename(partial, path)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def result(self, kind: str, number: int) -> Result | None:
        """What is known of a unit; None where it is not made, or is not of this build, or damaged.

        Raises OSError.
        """
        try:
            said, _, text = (self.path(kind, number) / _RESULT).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(text).hexdigest().encode() != said:
            return None
        result: Result = json.loads(text)
        return result if result["identity"] == self.plan.identity else None

    def made(self, kind: str, number: int) -> Result:
        """As `result`, of a unit that the pass before has made. Raises UserError: it has gone."""
        result = self.result(kind, number)
        if result is None:
            raise UserError(
                f"{self.path(kind, number)} is missing or damaged; give the same command again"
            )
        return result

    def checked(self, kind: str, number: int) -> Result | None:
        """As `result`, after comparing each file with its size and sha256. Raises OSError."""
        result = self.result(kind, number)
        for name, (size, sha256) in result["files"].items() if result else ():
            path = self.path(kind, number) / name
            try:
                whole = path.stat().st_size == size and sha256_of(path) == sha256
            except FileNotFoundError:
                whole = False
            if not whole:
                return None
        return result

    def note(self, name: str, value: Any) -> None:
        """Keep something of the whole build, such as `SETTLED`. Raises OSError."""
        write_json(self.folder / name, value)
        sync_folder(self.folder)

    def noted(self, name: str) -> Any:
        """What was kept under that name; None where nothing was. Raises OSError."""
        try:
            return json.loads((self.folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def tidy(self, mine: bool = False) -> None:
        """Remove what was begun and not finished: of all attempts, or of this one."""
        token = self.token if mine else "*"
        for path in self.folder.glob(f"*.{token}{_PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)

    def forget(self, changed: Changed) -> None:
        """Remove what has changed, so that the same command builds it anew. Raises OSError.

        What other units have is kept: it says what it was made of, and is compared with that.
        """
        if changed.unit is None:
            self.discard()
            return
        (self.folder / SETTLED).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path(SURVEY, changed.unit))

    def discard(self) -> None:
        """Remove all of it, the plan first: a part of the rest is no build to go on from.

        Raises OSError.
        """
        with contextlib.suppress(NotADirectoryError):
            forget_plan(self.folder)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)


@lru_cache(1)
def _given(path: Path, separator: str | None, multiple: int | None, identity: str) -> Tokenizer:
    """That of the build of this identity."""
    return read_tokenizer(path, separator, multiple)


@contextmanager
def kept(work: Work) -> Iterator[None]:
    """Do a part of a build in the block: where it fails, what is finished stays.

    Raises:
        UserError: also in place of an OSError, and where memory is short.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        raise unwritable(work.out, error) from error
    except Changed as changed:
        work.forget(changed)
        raise


class Making:
    """The folder of a unit that is being made.

    Fields: `folder`; `result`, to be filled in.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.result: Result = {"identity": identity, "files": {}}

    @contextmanager
    def file(self, name: str) -> Iterator[HashedFile]:
        """Write a file beside the result. Raises OSError."""
        file = HashedFile(self.folder / name)
        try:
            yield file
        finally:
            file.close()
        self.vouch(name, file.size, file.sha256.hexdigest())

    def vouch(self, name: str, size: int, sha256: str) -> None:
        """A file was written there, of that size and sha256."""
        self.result["files"][name] = [size, sha256]

    def close(self) -> None:
        """Write the result. Raises OSError."""
        text = json.dumps(self.result).encode()
        file = HashedFile(self.folder / _RESULT)
        try:
            file.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        finally:
            file.close()
        sync_folder(self.folder)
