"""`nlscale eval harness`: tasks of lm-evaluation-harness asked of a model of this package."""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nlscale.errors import UserError
from nlscale.evaluate.asking.context import Context
from nlscale.evaluate.asking.tokenizer import tokenizer_of
from nlscale.evaluate.harness.arguments import harness_version
from nlscale.evaluate.harness.figures import called, figure, normal
from nlscale.generate.model import Model

if TYPE_CHECKING:
    from nlscale.evaluate.harness.load import Loaded

_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""Those of the harness unless it is told others, so that few-shot examples are the same."""


def evaluate(model: Model, options: argparse.Namespace, context: Context) -> dict[str, Any]:
    """The figures of each task, and of groups of tasks.

    Args:
        model: that is asked.
        options: of `nlscale.evaluate.harness.arguments`.
        context: shares requests out over the ranks, and keeps what they find.

    Raises:
        UserError: the harness is not installed; the model has no tokenizer of text; a task that is
            not there, cannot be read or cannot be had; one that the harness or the model refuses.
    """
    version = harness_version()
    tokenizer_of(model, options.tokenizer)
    from nlscale.evaluate.harness.adapter import Adapter
    from nlscale.evaluate.harness.load import load, quiet

    with quiet():
        context.progress.say(f"loading {', '.join(task.name for task in options.tasks)}")
        loaded = load(options.tasks)
        adapter = Adapter(model, options.batch, options.max_length, context.parts)
        results = _answered(adapter, loaded, options)
        tasks = [_of_task(name, task, results) for name, task in loaded.tasks.items()]
        groups = [group for group in loaded.groups.values() if group.has_aggregation]
        tasks += [_of_group(group, tasks) for group in groups]
    return {
        "harness": version,
        "limit": options.limit,
        "max_length": options.max_length,
        "tasks": tasks,
        "figures": {
            f"{task['task']}/{called(one)}": one["value"]
            for task in tasks
            for one in task["figures"]
        },
    }


def _answered(adapter: Any, loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """What the harness makes of the answers: its `simple_evaluate`, without what that looks up of
    the machine and the working folder."""
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    for task in loaded.tasks.values():
        own = task.get_config("num_fewshot")
        shots = own if own == 0 or options.fewshot is None else options.fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_SEEDS["fewshot"])
    try:
        results: dict[str, Any] = evaluate(
            lm=adapter,
            task_dict={"tasks": loaded.tasks, "groups": {}, "group_map": {}},
            limit=options.limit,
            bootstrap_iters=0,
        )
    except (ValueError, AssertionError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"lm-evaluation-harness refuses: {line}") from error
    return results


def _of_task(name: str, task: Any, results: dict[str, Any]) -> dict[str, Any]:
    """Its figures, of what each document gave."""
    items: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for sample in results["samples"][name]:
        for metric in sample["metrics"]:
            items[metric, sample["filter"]].append(sample[metric])
    from lm_eval.api.metrics import mean

    aggregations, figures = task.aggregation(), []
    for (metric, filtered), values in items.items():
        found = figure(aggregations.get(metric, mean), values)  # as the harness does
        if found is not None:
            figures.append({"metric": metric, "filter": filtered, **found._asdict()})
    return {
        "task": name,
        "version": results["versions"][name],
        "fewshot": results["n-shot"][name],
        "documents": results["n-samples"][name]["effective"],
        "of": results["n-samples"][name]["original"],
        "figures": figures,
    }


def _of_group(group: Any, tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Its figures, as the harness makes them of those of its tasks."""
    metrics: dict[str, dict[str, Any]] = {}
    for task in tasks:
        metrics[task["task"]] = {"sample_len": task["documents"]}
        for one in task["figures"]:
            metrics[task["task"]] |= {
                f"{one['metric']},{one['filter']}": one["value"],
                f"{one['metric']}_stderr,{one['filter']}": one["stderr"],
            }
    found, figures = group.aggregate(metrics), []
    for metric in (one.metric for one in group.aggregate_metric_list):
        for key, value in found.items():
            if key.partition(",")[0] == metric:
                filtered = key.partition(",")[2]
                stderr = found.get(f"{metric}_stderr,{filtered}")
                stderr = stderr if isinstance(stderr, float) else None
                ends = None if stderr is None else normal(value, stderr)
                figures.append(
                    {
                        "metric": metric,
                        "filter": filtered,
                        "value": value,
                        "stderr": stderr,
                        "interval": ends,
                    }
                )
    return {
        "task": group.name,
        "version": group.version,
        "fewshot": None,
        "documents": found["sample_len"],
        "of": found["sample_len"],
        "figures": figures,
    }
