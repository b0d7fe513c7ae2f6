"""Asking models in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from described import differences

from nlscale import cli
from nlscale.evaluate.asking.context import Context
from nlscale.evaluate.asking.kept import Kept
from nlscale.evaluate.asking.progress import Progress
from nlscale.evaluate.asking.ranks import Ranks
from nlscale.evaluate.fields import ANSWERS


def alone(name: str) -> Context:
    """Of a single rank that keeps nothing and is silent."""
    return Context(name, Path("run"), Ranks(), Kept(None, ""), Progress("", False))


def nlscale(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def described(evaluation: str, answer: dict[str, Any]) -> None:
    """That the reference has all fields of an answer, and no others."""
    assert differences(answer, ANSWERS[evaluation]) == set()
