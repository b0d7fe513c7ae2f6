"""`nlscale eval recall`, `automata`, `mad` and `babi`: the task that a model was trained on."""

from __future__ import annotations

import argparse
from typing import Any

from nlscale.data.index import read_index
from nlscale.data.tasks.table import TASKS, task_of_index
from nlscale.data.tasks.task import Task
from nlscale.errors import UserError
from nlscale.evaluate.asking.context import Advance, Context, Part
from nlscale.evaluate.intervals import Share
from nlscale.evaluate.tasks import Score, score
from nlscale.evaluate.trained import Result
from nlscale.generate.given import data_of
from nlscale.generate.model import Model


def evaluate(model: Model, options: argparse.Namespace, context: Context) -> Result:
    """See `nlscale.evaluate.trained.Trained.made_by`.

    Raises:
        UserError: the model was trained on text, or on a task of another family.
    """
    task = task_of(model, options, context)
    if TASKS[task.name].family != context.name:
        folder = options.data or model.config.data.folders()[0]
        raise UserError(f"{folder} holds {task}; use nlscale eval {task.family}")
    return score_all(model, task, options.lengths, options.examples, context)


def task_of(model: Model, options: argparse.Namespace, context: Context) -> Task:
    """The task that a model was trained on.

    Raises:
        UserError: there is none, or the data that are named are of another one.
    """
    folder = options.data or data_of(model.config, "name the data of its task with --data")
    try:
        task = task_of_index(read_index(folder), folder)
    except UserError as error:
        raise UserError(f"{error}; or name the data of the run with --data") from None
    if model.config.data.sequence_length != task.length:
        raise UserError(
            f"{folder} holds {task}, whose examples have {task.length} tokens, and {context.path} "
            f"was trained with {model.config.data.sequence_length}; name its own data with --data"
        )
    return task


def score_all(
    model: Model, task: Task, factors: list[int], examples: int, context: Context
) -> Result:
    """The scores of a task at several lengths, each a part."""
    lengths = {factor: task if factor == 1 else task.longer(factor) for factor in factors}
    parts = [
        Part(f"{factor}x", examples * longer.length, factor) for factor, longer in lengths.items()
    ]

    def work(part: Part, advance: Advance) -> Result:
        return _described(score(model, task, part.of, examples, advance))

    scores = context.parts(parts, work)
    return {
        "task": str(task),
        "about": task.about,
        "chance": task.chance,
        "lengths": scores,
        "figures": {
            f"{one['factor']}x/{kind}": one[kind]["share"]
            for one in scores
            for kind in ("targets", "examples")
        },
    }


def _described(one: Score) -> dict[str, Any]:
    targets: Share = one.targets
    return {
        "factor": one.factor,
        "task": str(one.task),
        "length": one.task.length,
        "targets": targets.described(),
        "examples": one.examples.described(),
    }
