"""Asking one or several models a question: what was answered before is not asked again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlscale.config.vocabulary import mixer_label
from nlscale.errors import LostRank, SaidElsewhere, UserError
from nlscale.evaluate.asking.context import Context
from nlscale.evaluate.asking.kept import Kept, home_of, named, stem
from nlscale.evaluate.asking.progress import Progress
from nlscale.evaluate.asking.ranks import Ranks
from nlscale.evaluate.asking.tracked import track
from nlscale.evaluate.trained import Answer, Failed, trained
from nlscale.generate.imports import import_models
from nlscale.telemetry.files import to_json


def ask_all(
    name: str,
    folders: Sequence[Path],
    options: argparse.Namespace,
    ranks: Ranks,
    cache: Path | None = None,
) -> list[Answer | Failed]:
    """The answers of several models, each kept as soon as it is found.

    Of several, one that cannot be asked does not keep the others from it.

    Args:
        name: of the evaluation.
        folders: of runs, checkpoints or exports.
        options: of the evaluation; what it takes as default is in it, too.
        ranks: that ask together; the answers are those of the first.
        cache: where to keep results; None: each in its model's folder.

    Raises:
        UserError: there is no such evaluation or folder; or the model, the only one, cannot be
            asked this, or its results cannot be kept.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} is no folder; give that of a run, of a checkpoint, or of an export"
            )
    found: list[Answer | Failed] = []
    for number, folder in enumerate(folders):
        try:
            with ranks.trying(f"model{number}") as those:
                found.append(_ask(name, folder, options, those, cache))
        except (LostRank, SaidElsewhere):
            raise
        except UserError as error:
            if len(folders) == 1:
                raise
            found.append(Failed(str(folder), str(error)))
    return found


def _ask(
    name: str, folder: Path, options: argparse.Namespace, ranks: Ranks, cache: Path | None
) -> Answer:
    one = trained(name)
    asked = {key: value for key, value in vars(options).items() if key not in one.speed}
    found = named(folder)
    home = cache or home_of(folder)
    # The first rank's files decide for all: not every node need see them alike.
    before = Kept(home, stem(name, found, asked)).result() if ranks.first else None
    before = ranks.broadcast(before)
    if before is not None:
        return _answer(folder, before)

    import_models()
    from nlscale.generate.load import load

    progress = Progress(f"nlscale eval {name} {folder}", ranks.first)
    model = load(folder, device=_device(ranks))
    steps = set(ranks.gather(model.step))
    if len(steps) > 1:
        raise UserError(
            f"ranks read {folder} at steps {', '.join(f'{s:,}' for s in sorted(steps))}: it is "
            f"being trained, or nodes see other files; name one of its checkpoints"
        )
    kept = Kept(home if ranks.first else None, stem(name, named(folder, model.step), asked))
    # The newest checkpoint may be broken, and the one before it have been asked.
    before = ranks.broadcast(kept.result())
    if before is not None:
        return _answer(folder, before)
    kept.make()
    context = Context(name, folder, ranks, kept, progress)
    result = one.evaluate(model, options, context)
    whole = {
        "evaluation": name,
        "step": model.step,
        "mixer": mixer_label(model.config.model),
        "options": {key: value for key, value in asked.items() if value is not None},
        "result": result,
    }
    whole = json.loads(to_json(whole))  # as it is when it is read again
    if ranks.first:
        kept.finish(whole)
        track(folder, name, asked, whole["result"].get("figures", {}), progress.say)
    return _answer(folder, whole)


def _answer(folder: Path, whole: Mapping[str, Any]) -> Answer:
    try:
        return Answer(str(folder), whole["step"], whole["mixer"], whole["result"])
    except KeyError as error:
        raise UserError(f"a result kept of {folder} lacks {error}; remove it") from None


def _device(ranks: Ranks) -> str | None:
    """A GPU for each rank of a node, where there are any."""
    import torch

    if ranks.world == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
