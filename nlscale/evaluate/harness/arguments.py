"""What `nlscale eval harness` takes. No torch is imported, and the harness itself is not either."""

from __future__ import annotations

import argparse
import hashlib
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from nlscale.config.arguments import whole
from nlscale.errors import UserError
from nlscale.evaluate.harness.suite import SUITES
from nlscale.generate.given import add_tokenizer

_DISTRIBUTION = "lm-eval"


class Chosen(NamedTuple):
    """A task, or a group of them, as it was asked for."""

    name: str
    """Of the harness's own; or the path of a YAML file."""
    content: str
    """A hash of that file and of what it names beside it; of the harness's own its version."""

    def __str__(self) -> str:
        return self.name

    @property
    def is_file(self) -> bool:
        """Whether `name` is a path."""
        return _is_path(self.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument(
        "--tasks",
        type=tasks,
        required=True,
        metavar="TASK,...",
        help="names of tasks or groups of lm-evaluation-harness, YAML files that describe one, or "
        f"a suite: {', '.join(SUITES)}",
    )
    parser.add_argument(
        "--limit",
        type=whole(least=1),
        metavar="N",
        help="the first N documents of each task alone (default: all)",
    )
    parser.add_argument(
        "--fewshot",
        type=whole(least=0),
        metavar="N",
        help="examples before each question, but for tasks that say 0 themselves (default: what "
        "each task says)",
    )
    parser.add_argument(
        "--batch",
        type=whole(least=1),
        default=16,
        metavar="N",
        help="sequences that are read side by side; it changes the speed alone (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=whole(least=2),
        metavar="TOKENS",
        help="cut what a model reads down to its last tokens, as is done for models that can read "
        "no more (default: nothing is cut)",
    )
    add_tokenizer(parser)


def tasks(text: str) -> list[Chosen]:
    """Such as `wikitext,tasks/mine.yaml` or `paper`; suites as the tasks that they are of.

    Raises:
        ArgumentTypeError: there is no such file, or nothing is named.
        UserError: the harness is not installed.
    """
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise argparse.ArgumentTypeError("names no task; give such as wikitext,piqa or paper")
    version = harness_version()
    found: dict[str, Chosen] = {}
    for name in names:
        suite = [listed.task for listed in SUITES.get(name, ())]
        for task in suite or [name]:
            found[task] = Chosen(task, _content(task) if _is_path(task) else version)
    return list(found.values())


def harness_version() -> str:
    """Of lm-evaluation-harness. Raises UserError: it is not installed."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise UserError(
            'nlscale eval harness needs lm-evaluation-harness; pip install "nlscale[eval]"'
        ) from None


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _content(name: str) -> str:
    """A hash of a YAML file, and of the files that it names: data, other YAML, functions.

    They are looked for as the harness does: data from the working folder, the others beside it.
    """
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise argparse.ArgumentTypeError(f"cannot read {path}: {reason}") from None
    hashed = hashlib.sha256(text.encode())
    for word in sorted(set(re.findall(r"[^\s,'\"\[\]{}]+", text))):
        module = f"{word.partition('.')[0]}.py"
        for other in (Path(word), path.parent / word, path.parent / module):
            if other != path and other.is_file():
                hashed.update(f"{word}\n".encode() + other.read_bytes())
    return hashed.hexdigest()[:16]
