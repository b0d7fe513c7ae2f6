"""Makes exported models known to transformers wherever nlscale is imported.

Importing transformers takes seconds, and most who import nlscale want none of it. So the classes
are registered when it imports what they are registered with; where it has been imported before, at
once.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _configuration() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from nlscale.checkpoint.export.configuration import NlscaleConfig

    AutoConfig.register(NlscaleConfig.model_type, NlscaleConfig, exist_ok=True)


def _model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from nlscale.checkpoint.export.configuration import NlscaleConfig
    from nlscale.checkpoint.export.registered import NlscaleForCausalLM

    AutoModelForCausalLM.register(NlscaleConfig, NlscaleForCausalLM, exist_ok=True)


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.modeling_auto": _model,
}
"""What is registered after the import of which module."""


class _Watch(MetaPathFinder):
    """Finds nothing; has the loader of a module of `_AFTER` register ours when it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = self._waiting.pop(name, None)
        if register is None:
            return None
        spec = importlib.util.find_spec(name)  # by the other finders: this one waits no longer
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _try(register)

            loader.exec_module = execute_and_register
        return spec

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self._waiting = waiting


def register_when_imported() -> None:
    """Have transformers know the classes of exports, now or as soon as it is imported."""
    waiting = {}
    for name, register in _AFTER.items():
        if name in sys.modules:
            _try(register)
        else:
            waiting[name] = register
    if waiting:
        sys.meta_path.insert(0, _Watch(waiting))


def _try(register: Callable[[], None]) -> None:
    """An import of someone who may want nothing of ours is not to fail by it."""
    try:
        register()
    except Exception as error:
        warnings.warn(
            f"nlscale's class is not registered with transformers, which refuses it: {error}; "
            f"trust_remote_code=True loads the one that an export carries",
            stacklevel=2,
        )
