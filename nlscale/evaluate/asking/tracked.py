"""Results into the wandb run of a model, where its run had one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.evaluate.asking.kept import EVALS, home_of
from nlscale.telemetry.tracking import WandbOptions, WandbRun

_CONFIG = "config.yaml"


def track(folder: Path, name: str, figures: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Put figures into the summary of the run's wandb run, as `eval/NAME/FIGURE`.

    Nothing is done where the folder is of no run, or of one that was not tracked.

    Args:
        folder: of a run or one of its checkpoints.
        name: of the evaluation.
        figures: numbers by name.
        say: takes a line for the user; what fails in wandb is one.
    """
    home = home_of(folder)
    run = home.parent
    if home.name != EVALS or not (run / _CONFIG).is_file():
        return
    try:
        config = recipe.load(run / _CONFIG).config
    except UserError as error:
        say(f"not tracked: {error}")
        return
    if not config.wandb.enabled:
        return
    options = WandbOptions(True, config.wandb.project, config.wandb.name)
    wandb = WandbRun(run, options, recipe.to_plain(config), say, say)
    wandb.finish({f"eval/{name}/{figure}": value for figure, value in figures.items()})
