"""Results into the wandb run of a model, where its run had one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.evaluate.asking.kept import EVALS, contents, digest_of, home_of
from nlscale.evaluate.trained import trained
from nlscale.telemetry.tracking import WandbOptions, WandbRun

_CONFIG = "config.yaml"


def track(
    folder: Path,
    name: str,
    asked: Mapping[str, Any],
    figures: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Put figures into the summary of the run's wandb run, as `eval/QUESTION/FIGURE`.

    The question is the evaluation's name. Where options are not the defaults, digits that stand for
    these and for what the files hold that they name come after it, and `eval/QUESTION/asked` says
    which they are: other questions have other keys, and one has the same in every run.

    Nothing is done where the folder is of no run, or of one that was not tracked.

    Args:
        folder: of a run or one of its checkpoints.
        name: of the evaluation.
        asked: its options, the defaults among them, but for those that change the speed alone.
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
    question, words = _question(name, asked)
    summary = {**figures, **({"asked": words} if words else {})}
    wandb.finish({f"eval/{question}/{key}": value for key, value in summary.items()})


def _question(name: str, asked: Mapping[str, Any]) -> tuple[str, str]:
    """What it is called, and the options that are not the defaults, in words."""
    parser = argparse.ArgumentParser(add_help=False)
    trained(name).add_arguments(parser)
    own = {k: value for k, value in asked.items() if value != parser.get_default(k)}
    if not own:
        return name, ""
    words = ", ".join(f"{key}={_in_words(value)}" for key, value in sorted(own.items()))
    return f"{name}-{digest_of(contents(own))[:8]}", words


def _in_words(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
