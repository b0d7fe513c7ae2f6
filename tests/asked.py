"""Asking models in tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlscale import cli
from nlscale.cluster.life.place import Place
from nlscale.evaluate.asking.context import Context
from nlscale.evaluate.asking.kept import Kept
from nlscale.evaluate.asking.progress import Progress
from nlscale.evaluate.asking.ranks import Ranks


def alone(name: str) -> Context:
    """Of a single rank that keeps nothing and is silent."""
    return Context(name, Path("run"), Ranks(Place(), None), Kept(None, ""), Progress("", False))


def nlscale(*arguments: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code
