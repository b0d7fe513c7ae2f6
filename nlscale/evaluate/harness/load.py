"""Tasks of lm-evaluation-harness by name or file, with their data. Importing this imports it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import lm_eval
import lm_eval.api.task
import yaml
from huggingface_hub import constants
from lm_eval.tasks import TaskManager

from nlscale.config.schema import nearest
from nlscale.errors import UserError
from nlscale.evaluate.harness.arguments import Chosen
from nlscale.evaluate.harness.suite import FOLDERS

_HUB_SECONDS = 5.0
_LOGGERS = ("lm_eval", "datasets", "huggingface_hub")


class Loaded(NamedTuple):
    """What was asked for, with its data; objects of the harness."""

    tasks: dict[str, Any]
    """By name, those of groups among them, in their order."""
    groups: dict[str, Any]
    """By name."""
    manager: TaskManager


def load(chosen: Sequence[Chosen]) -> Loaded:
    """Find the tasks and get their data.

    Raises:
        UserError: no such task; or one that cannot be read, or whose data cannot be had.
    """
    loaded = Loaded({}, {}, _manager(chosen))
    out_of_reach: list[str] = []
    with _hub(any(not task.is_file for task in chosen)):
        for task in chosen:
            if not task.is_file and task.name not in loaded.manager.task_index:
                raise UserError(
                    f"lm-evaluation-harness has no task {task.name!r}; "
                    f"{_nearest(task.name, loaded.manager)}"
                )
            try:
                found = loaded.manager.load([_group(task) or task.name])
            except ConnectionError:
                out_of_reach.append(task.name)
            except OSError as error:
                raise UserError(f"the data of task {task.name}: {_line(error)}") from error
            except (ValueError, KeyError, TypeError, yaml.YAMLError, ImportError) as error:
                raise UserError(f"task {task.name} cannot be read: {_line(error)}") from error
            else:
                loaded.tasks.update(found["tasks"])
                loaded.groups.update(found["groups"])
    if out_of_reach:
        raise UserError(
            f"no data for {', '.join(out_of_reach)}: the Hugging Face hub cannot be reached, and "
            f"they are not in HF_HOME ({constants.HF_HOME}); copy that folder from a machine that "
            f"has run the same command, or name YAML files with data of your own"
        )
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness and what loads its data draw no bars and log errors alone."""
    with ExitStack() as stack:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if datasets.are_progress_bars_disabled():
            stack.callback(datasets.disable_progress_bars)
        else:
            stack.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
        # The bar over the documents of a task cannot be turned off otherwise.
        with _set(lm_eval.api.task, "tqdm", lambda items, **named: items):
            yield


def _manager(chosen: Sequence[Chosen]) -> TaskManager:
    """One that knows the tasks that are named; of all the harness's only where it has to."""
    names = {task.name for task in chosen if not task.is_file}
    own = Path(lm_eval.__file__).parent / "tasks"
    folders = {own / FOLDERS[name] for name in names & FOLDERS.keys()}
    folders |= {Path(task.name).parent for task in chosen if _group(task)}
    few = TaskManager(include_path=sorted(map(str, folders)), include_defaults=False)
    if names <= few.task_index.keys():
        return few
    return TaskManager(include_path=sorted(map(str, folders)))


def _group(task: Chosen) -> str | None:
    """The group that a YAML file describes, whose tasks are looked for beside it; else None."""
    if not task.is_file:
        return None
    text = Path(task.name).read_text(encoding="utf-8")
    found = re.search(r"^group:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else None


def _nearest(name: str, manager: TaskManager) -> str:
    near = nearest(name, manager.all_tasks)
    return near if near.startswith("did you mean") else "`lm_eval ls tasks` lists them"


@contextmanager
def _hub(wanted: bool) -> Iterator[None]:
    """Inside, where the hub does not answer, only what is in the cache is looked for.

    Without it, each data set is asked for again and again for half a minute.
    """
    if not wanted or constants.HF_HUB_OFFLINE or _answers():
        yield
        return
    with (
        _set(constants, "HF_HUB_OFFLINE", True),
        _set(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


@contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, a name of a module stands for something else."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _answers() -> bool:
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # those of whichever HTTP library is in use
        return False
    return True


def _line(error: BaseException) -> str:
    """The first line of what it says."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().partition("\n")[0].rstrip(".") or type(error).__name__
