"""Packages of others that add mixers, optimizer rules or evaluations when they are imported.

Only a person names them: in a recipe (`run.imports`) or on the command line. What a checkpoint or
an export says is never imported, and a run's config.yaml has no `run.imports`: loading one runs
nothing that it brought along.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from nlscale.errors import UserError


def import_all(modules: list[str]) -> None:
    """Import modules by name, those of the current folder included.

    Raises:
        UserError: a module is not there, or fails.
    """
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.append(here)
    for module in modules:
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--import {module}: {_why(error, module)}") from error


def _why(error: Exception, module: str) -> str:
    """Whether it is not there, or what in it failed, and where."""
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}, neither in the current folder nor installed"
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"it failed when it was imported: {reason} ({last.filename} line {last.lineno})"
