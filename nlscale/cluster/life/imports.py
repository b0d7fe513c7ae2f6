"""Importing much at once, as the start of every rank does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """While modules are imported, do not look for garbage, nor later among what they hold.

    Python looks for cycles of it whenever enough objects are new, through all that there are: a
    quarter of the time of importing torch and megatron-core, and half a second at some step of a
    run. What modules hold stays.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if enabled:
            gc.enable()
