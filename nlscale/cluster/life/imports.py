"""Importing much at once, as the start of every rank does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """While modules are imported, do not look for garbage.

    Python looks for cycles of it whenever enough objects are new, through all that there are: a
    quarter of the time of importing torch and megatron-core, and what modules hold stays.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
