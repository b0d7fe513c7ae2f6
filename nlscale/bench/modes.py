"""What `bench sync` measures: the modes, and a run that fits the emulated nodes (no torch)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

from nlscale.bench.netns import EmulatedNodes
from nlscale.config.curriculum import at_stage, largest
from nlscale.config.vocabulary import Config, Reduction
from nlscale.errors import UserError
from nlscale.levels.spectrum import Level, levels_of
from nlscale.plan import Cluster, make_plan
from nlscale.plan.on_cluster import vocabulary_of
from nlscale.plan.traffic import cycle_steps

WARMUP = 1
"""Steps before the first that counts."""
_FEWEST_STEPS = 16


@dataclass(frozen=True)
class Mode:
    """A way to reduce the levels."""

    name: str
    reduction: Reduction
    stagger: bool = False
    overlap: bool = False

    @property
    def reference(self) -> str:
        """The mode that makes the same updates, reduces at every step and overlaps nothing."""
        return "every-step-staggered" if self.stagger else "every-step"

    @property
    def twin(self) -> str:
        """The mode that sends the same and overlaps nothing."""
        return self.name.removesuffix("-overlapped")


MODES = (
    Mode("every-step", Reduction.every_step),
    Mode("deferred", Reduction.deferred),
    Mode("every-step-staggered", Reduction.every_step, stagger=True),
    Mode("deferred-staggered", Reduction.deferred, stagger=True),
    Mode("every-step-overlapped", Reduction.every_step, overlap=True),
    Mode("deferred-overlapped", Reduction.deferred, overlap=True),
)


@dataclass(frozen=True)
class Bench:
    """A run to be measured in every mode."""

    config: Config
    """Its length and vocabulary are set; when its levels reduce is each mode's own."""
    nodes: EmulatedNodes
    ranks_per_node: int
    levels: list[Level]
    vocabulary: int
    steps: int
    """That count: whole cycles of the periods."""

    @property
    def ranks(self) -> int:
        return self.nodes.count * self.ranks_per_node

    def configurations(self) -> Iterator[tuple[Mode, Config]]:
        """Each mode and its configuration."""
        for mode in MODES:
            config = copy.deepcopy(self.config)
            config.levels.reduction, config.levels.stagger = mode.reduction, mode.stagger
            config.parallel.overlap = mode.overlap
            yield mode, config


def prepare(
    config: Config, nodes: EmulatedNodes, ranks_per_node: int, steps: int | None = None
) -> Bench:
    """Check a run and give it its length: the warm-up, the steps that count and one more.

    Args:
        config: the run.
        nodes: not yet entered.
        ranks_per_node: ranks on each.
        steps: to count, a multiple of the cycle of the periods; null: one cycle, at least 16.

    Raises:
        UserError: the run does not fit the nodes, or the steps would cut a cycle.
    """
    config = copy.deepcopy(config)
    # the plan's checks are those of a run
    gbit = nodes.bits_per_second / 1e9
    make_plan(config, Cluster("emulated nodes", nodes.count, ranks_per_node, gbit, math.inf))
    config = at_stage(config, largest(config))
    levels = levels_of(config)
    steps = _whole_cycles(steps, cycle_steps(levels))
    vocabulary = config.model.vocabulary = vocabulary_of(config)
    config.train.steps = WARMUP + steps + 1
    config.parallel.ranks_per_node = ranks_per_node
    return Bench(config, nodes, ranks_per_node, levels, vocabulary, steps)


def _whole_cycles(steps: int | None, cycle: int) -> int:
    if steps is None:
        return -(-_FEWEST_STEPS // cycle) * cycle
    if steps < 1 or steps % cycle:
        near = sorted({steps // cycle * cycle, -(-steps // cycle) * cycle} - {0})
        raise UserError(
            f"--steps {steps} does not hold whole cycles of the periods, {cycle} steps; "
            f"use {' or '.join(map(str, near or [cycle]))}"
        )
    return steps
