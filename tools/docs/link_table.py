"""Exposed link time of the shipped recipes, as docs/concepts/plan.md has it.

python tools/docs/link_table.py
"""

from __future__ import annotations

import copy
from dataclasses import replace

from nlscale.config.recipe import load
from nlscale.plan import load_cluster, make_plan

RUNS = (
    ("hope-1.3b", "two-nodes-16-gpus"),
    ("hope-7b", "eight-nodes-64-gpus"),
    ("hope-70b", "sixtyfour-nodes-512-gpus"),
)
GBIT = (400.0, 3200.0)


def rows() -> list[str]:
    """A line of markdown for each recipe and rate, in milliseconds a step."""
    lines = []
    for recipe, machines in RUNS:
        for gbit in GBIT:
            cluster = replace(load_cluster(machines), inter_node_gbit=gbit)
            config = load(recipe, []).config
            cells, step = [], 0.0
            for overlap in (False, True):
                one = copy.deepcopy(config)
                one.parallel.overlap = overlap
                exposure = make_plan(one, cluster).exposure
                assert exposure is not None
                step = exposure.step_seconds
                times = (exposure.plain, exposure.run)
                cells += [f"{1e3 * sum(time.exposed):.1f} ms" for time in times]
            gpus = cluster.nodes * cluster.gpus_per_node
            lines.append(
                f"| {recipe}, {gpus} GPUs | {gbit:g} | {step:.2f} s | {' | '.join(cells)} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))
