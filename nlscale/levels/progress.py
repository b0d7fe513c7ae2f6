"""Where sync groups stand: what is in their windows, and how often they have updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from nlscale.levels.noise import GradientNoise
from nlscale.parallel.consensus import Verdict


@dataclass
class Progress:
    """Where a sync group stands; the same on every rank, also on those that hold none of it."""

    tokens: int = 0
    """Tokens in the window, of the steps admitted since the last update, over all ranks."""
    counted_tokens: int = 0
    """Targets among them that count: its gradient is a mean over these."""
    updates: int = 0
    reductions: int = 0
    """Across nodes; fewer than steps only where they are deferred."""
    short: int = 0
    """Steps by which the periods of its updates were shorter than the longest, together."""
    before_state: int = 0
    """Updates before the optimizer's state was begun anew (`nlscale.levels.anew`)."""
    owed_tokens: int = 0
    """W_0 of `nlscale.levels.feedback`: tokens of the window in whose sums it is counted what
    rounding has left; 0: nothing is."""
    noise: GradientNoise = field(default_factory=GradientNoise)
    """Of its gradient."""

    outer_updates: int = 0
    """Since the last outer step; 0 where the level makes none."""
    outer_steps: int = 0
    node_counted: list[int] = field(default_factory=list)
    """Of a local level, what `counted_tokens` consists of: those of each node."""
    outer_counted: list[int] = field(default_factory=list)
    """Likewise, of all its updates since the last outer step."""

    @classmethod
    def of_plain(cls, saved: dict[str, Any], noise: dict[str, Any] | None) -> Progress:
        """As a checkpoint has it; of versions that lack some of it, as it was then.

        Without masks every token counted.
        """
        found = {**cls().to_plain(), "counted_tokens": saved["tokens"], **saved}
        names = {f.name for f in fields(cls)} - {"noise"}
        return cls(**{name: found[name] for name in names}, noise=GradientNoise(**noise or {}))

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint; the noise, which depends on the layout, is kept apart."""
        return {name: value for name, value in asdict(self).items() if name != "noise"}

    def memory_updates(self, longest: int, period: int) -> float:
        """Updates at a period by which memories of gradients would have decayed as they have.

        Where a beta is b^C at an update of period C (`nlscale.optim.period`), their product is b to
        the sum of the periods.

        Args:
            longest: period of the group.
            period: in steps.
        """
        return (self.state_updates * longest - self.short) / period

    @property
    def state_updates(self) -> int:
        """Updates that the optimizer's state knows of: the step count of a rule."""
        return self.updates - self.before_state

    def begin_state(self) -> None:
        """The optimizer's state begins anew."""
        self.before_state, self.short = self.updates, 0

    def take(self, verdict: Verdict) -> None:
        """A step that was admitted is in the window."""
        self.tokens += verdict.tokens
        self.counted_tokens += verdict.counted_tokens
        self.node_counted = _added(self.node_counted, verdict.node_counted)

    def close(self, outer: bool) -> bool:
        """The window is closed; whether the group has made an update by it.

        Args:
            outer: whether its level makes outer steps.
        """
        updated = self.counted_tokens > 0
        if updated:
            self.updates += 1
            self.outer_updates += outer
            self.outer_counted = _added(self.outer_counted, self.node_counted)
        self.tokens = self.counted_tokens = 0
        self.node_counted = [0] * len(self.node_counted)
        return updated

    def outer_share(self, node: int) -> float | None:
        """Of an outer step, the weight of what a node's updates have made, which all sum to 1;
        None: all nodes have made the same ones."""
        of_nodes = self.outer_counted
        return of_nodes[node] / sum(of_nodes) if of_nodes else None

    def step_outer(self) -> None:
        """It has made an outer step."""
        self.outer_steps += 1
        self.outer_updates = 0
        self.outer_counted = [0] * len(self.outer_counted)

    def move_to(self, nodes: int) -> None:
        """Of a local level, begun on another number of nodes: what each has of its own now.

        The first has the window so far. All go on from the mean of the weights, so that what was
        counted since the last outer step is shared out evenly.
        """
        if len(self.node_counted) == nodes:
            return
        self.node_counted = [self.counted_tokens] + [0] * (nodes - 1)
        each, over = divmod(sum(self.outer_counted), nodes)
        self.outer_counted = [each + (node < over) for node in range(nodes)]


class Counted(NamedTuple):
    """Targets that count in the window of a sync group that closes, float64 []."""

    of_all: Tensor
    """On all nodes; where there are none, the group makes no update."""
    here: Tensor
    """Those that its gradient is the sum over; of a local level, this node's."""


def _added(numbers: list[int], more: Sequence[int]) -> list[int]:
    """Sums of what stands at the same place; none where there are no numbers."""
    return [a + b for a, b in zip(numbers, more, strict=True)] if numbers else numbers
