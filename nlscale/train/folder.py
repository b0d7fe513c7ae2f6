"""What a run has left in its folder, for who asks from Python. No torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlscale.checkpoint import FOLDER
from nlscale.config import recipe
from nlscale.config.fields import path_of
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.telemetry.fields import SUMMARY
from nlscale.telemetry.figures import METRICS_FILE, SUMMARY_FILE, read_records
from nlscale.telemetry.files import read_object
from nlscale.telemetry.records import mistyped

if TYPE_CHECKING:
    import pyarrow

CONFIG_FILE = "config.yaml"
WRITER = "nlscale train"
"""What the owner of a run's folder calls itself."""


@dataclass(frozen=True)
class Run:
    """A run, finished or under way; its files are read anew each time.

    Attributes:
        folder: its `run.dir`
    """

    folder: Path

    @property
    def config(self) -> Config:
        """Its configuration, every key of it.

        Raises:
            UserError: it names a mixer or a rule of a package that was not imported.
        """
        return recipe.load(self.folder / CONFIG_FILE).config

    @property
    def summary(self) -> dict[str, Any] | None:
        """What summary.json holds; None until the run has finished.

        Raises:
            UserError: the file is damaged, or cannot be read.
        """
        return read_summary(self.folder / SUMMARY_FILE)

    @property
    def finished(self) -> bool:
        """Whether its last step is taken and its summary written; one that is damaged is not."""
        try:
            return self.summary is not None
        except UserError:
            return False

    @property
    def checkpoints(self) -> list[Path]:
        """Its finished checkpoints, oldest first; `nlscale.load` takes each."""
        found = (self.folder / FOLDER).glob("step-*")
        return sorted(path for path in found if path.name.removeprefix("step-").isdigit())

    def metrics(self, kind: str = "train") -> pyarrow.Table:
        """The records of metrics.jsonl of one kind, a row each, oldest first.

        Fields of fields are columns with dotted names, such as `levels.fast.grad_norm`; a field
        that a record lacks is null. A record that is being written is left out.

        Args:
            kind: `train`, `validation` or `evaluation`.

        Raises:
            UserError: there are no records of that kind.
        """
        import pyarrow

        path = self.folder / METRICS_FILE
        records = read_records(self.folder)
        rows = [_flat(record) for record in records if record.get("kind") == kind]
        if not rows:
            kinds = dict.fromkeys(str(record.get("kind")) for record in records)
            raise UserError(
                f"{path} has no records of kind {kind!r}; it has {', '.join(kinds) or 'none yet'}"
            )
        columns = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            # what is null in every record is a number in others: norms, rates, losses
            never = all(value is None for value in values)
            try:
                columns[name] = pyarrow.array(values, pyarrow.float64() if never else None)
            except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
                raise UserError(f"{path}: {name} is not of one type: {error}") from None
        return pyarrow.table(columns)


def read_summary(path: Path) -> dict[str, Any] | None:
    """What the summary.json of a run holds; None where there is none.

    Raises:
        UserError: it is damaged, or cannot be read; one line with its path.
    """
    if not path.exists():
        return None
    summary = read_object(path)
    if "final_val_loss" not in summary:
        raise UserError(f"{path} is damaged: it holds no final_val_loss")
    if wrong := mistyped(summary, SUMMARY):
        raise UserError(f"{path} is damaged: {wrong}")
    return summary


def read(path: str | Path) -> Run:
    """See `nlscale.read`."""
    folder = path_of(path)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"no run in {folder}: it has no {CONFIG_FILE}; give the folder that run.dir named"
        )
    return Run(folder)


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name, without the record's kind."""
    fields: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            fields |= _flat(value, f"{prefix}{name}.")
        elif prefix or name != "kind":
            fields[f"{prefix}{name}"] = value
    return fields
