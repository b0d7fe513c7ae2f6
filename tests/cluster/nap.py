"""An evaluation that only waits, for runs that must last and leave the machine to others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nlscale.evaluate.table import Evaluation, register

if TYPE_CHECKING:
    from nlscale.data import Samples
    from nlscale.step.trainer import Trainer

SECONDS = 0.2


def nap(trainer: Trainer, samples: Samples) -> dict[str, Any]:
    """No figures."""
    time.sleep(SECONDS)
    return {}


register("nap", Evaluation("tests.cluster.nap:nap"))
