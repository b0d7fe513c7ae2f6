"""Every layout of ranks reproduces the recorded loss curves."""

from __future__ import annotations

import json

import pytest
import world
from golden.make import FAMILIES, FOLDER, losses

# Nats; sums in another order, or another processor, over twenty steps. Seen: at most 2e-5.
TOLERANCE = 1e-4

LAYOUTS = {
    "one-process": (1, []),
    "dp2": (2, []),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2x2": (2, ["parallel.pipeline=2", "parallel.virtual_stages=2"]),
    "tp2-sp-pp2-dp2": (
        8,
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
    ),
    "two-nodes": (4, ["parallel.ranks_per_node=2", "train.micro_batch=2"]),
}


# Of the curve that a layout of several ranks is held to: each level has closed two windows by then.
SPREAD_OUT = 8


# One process makes all curves again; hope's are made on every layout, each other family's on
# every second.
CASES = [
    (family, layout)
    for i, family in enumerate(FAMILIES)
    for j, layout in enumerate(LAYOUTS)
    if family == "hope" or layout == "one-process" or (i + j) % 2
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_recorded_losses_are_reproduced(family: str, layout: str) -> None:
    ranks, overrides = LAYOUTS[layout]
    recorded = json.loads((FOLDER / f"{family}.json").read_text())["loss"]
    steps = SPREAD_OUT if ranks > 1 else len(recorded)
    results = world.run(ranks, losses, family, overrides, steps, ranks_per_node=ranks)
    assert len(recorded) == 20 and recorded[-1] < recorded[0] - 0.5, "it must learn to be a guard"
    assert recorded[steps - 1] < recorded[0] - 0.2, "so must its beginning"
    for curve in results:
        assert curve == pytest.approx(recorded[:steps], abs=TOLERANCE)
