"""What a model that lacks it is given: a tokenizer (`--tokenizer`), data. No torch is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nlscale.checkpoint.export import NO_DATA
from nlscale.config.arguments import path
from nlscale.config.fields import path_of
from nlscale.config.urls import Location, location_of
from nlscale.config.vocabulary import Config
from nlscale.data.tokenizer import TOKENIZER_NAME, Tokenizer, load_tokenizer
from nlscale.errors import UserError

if TYPE_CHECKING:
    from nlscale.generate.model import Model


def check_folder(given: str | Path) -> None:
    """Refuse at once, before torch is imported, what cannot be a model.

    Raises:
        UserError: it is no folder.
    """
    if not path_of(given).is_dir():
        raise UserError(f"{given} is no folder; give that of a run, a checkpoint or an export")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """`--tokenizer`, whose value is the path of a file `tokenizer.json` that can be read."""
    parser.add_argument(
        "--tokenizer",
        type=_file,
        metavar="DIR",
        help=f"the folder of a {TOKENIZER_NAME}, or that file, where the data of the run are not",
    )


def _file(text: str) -> Path:
    """Raises UserError: there is none, or it cannot be read."""
    given = path(text)
    file = given if given.name == TOKENIZER_NAME and not given.is_dir() else given / TOKENIZER_NAME
    load_tokenizer(file.parent)  # now, and not when the model is loaded
    return file


def tokenizer_for(model: Model, file: Path | None) -> Tokenizer:
    """The tokenizer of a model from now on.

    Args:
        model: that it becomes the model's own of.
        file: what `--tokenizer` named; None: the model's own, which has to be there.

    Raises:
        UserError: there is none, or it has more ids than the model.
    """
    if file is not None:
        model.tokenizer = load_tokenizer(file.parent)
    try:
        return model.tokenizer
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; name the folder of one with --tokenizer") from None


def data_of(config: Config, fix: str) -> Location:
    """The data folder that a model was trained on, which may not be there any more.

    Args:
        config: of the model.
        fix: what else can be given.

    Raises:
        UserError: it was imported, and is of no data, or of those of several folders; ends with
            `fix`.
    """
    folders = config.data.folders()
    if folders == [NO_DATA]:
        raise UserError(f"the model was imported, and has no data of its own; {fix}")
    if len(folders) > 1:
        raise UserError(f"the model was trained on a mixture of {', '.join(folders)}; {fix}")
    return location_of(folders[0])
