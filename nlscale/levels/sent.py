"""How many bytes a node sends the others at a step, as `nlscale plan` counts them."""

from __future__ import annotations

from collections.abc import Mapping, Set

from nlscale.config.vocabulary import Config
from nlscale.levels.passes import group_matrices, matrix_crossing_bytes
from nlscale.levels.spectrum import Level, SyncGroup, gathered_bytes, reduction_bytes
from nlscale.parallel.layout import Layout


class Sent:
    """Inter-node bytes of the last step, the mean over the nodes.

    Args:
        config: of the run.
        levels: its spectrum.
        sizes: parameters of each sync group of the whole model.
        layout: this rank's place.
    """

    def __init__(
        self, config: Config, levels: list[Level], sizes: Mapping[SyncGroup, int], layout: Layout
    ) -> None:
        self._config, self._levels, self._layout = config, levels, layout
        self._sizes = sizes
        depths = range(config.model.layers)
        matrices = group_matrices(config, levels, config.levels.stagger, depths)
        self._whole = {m.group: m for m in matrices}
        self._more = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._more = 0.0

    def again(self, group: SyncGroup) -> None:
        """The group's gradients cross a second time."""
        self._more += self._bytes(group)

    def matrices(self, group: SyncGroup, updates: int) -> None:
        """The group updates, after so many updates: whole matrices cross in it."""
        if group not in self._whole:
            return
        values = self._whole[group].values()
        own, nodes = values[updates % len(values)], self._layout.nodes
        crossing = matrix_crossing_bytes(self._config, own, nodes)
        self._more += crossing * nodes / self._layout.all_nodes

    def end(self, crossed: Set[SyncGroup]) -> tuple[float, float]:
        """What a node sent at the step, and what it did not have to send.

        Args:
            crossed: the groups that crossed at the step; the others had not to.
        """
        sent, saved = 0.0, 0.0
        for group in self._sizes:
            if group in crossed:
                sent += self._bytes(group)
            else:
                saved += self._bytes(group)
        return sent + self._more, saved

    def _bytes(self, group: SyncGroup) -> float:
        wire, nodes = self._levels[group.level].wire, self._layout.nodes
        gathered = gathered_bytes(self._config)
        sent = reduction_bytes(self._sizes[group], nodes, wire, gathered)
        return sent * nodes / self._layout.all_nodes
