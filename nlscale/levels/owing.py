"""What windows owe, brought along from one to the next.

An update divides a window's sum by its targets, so that what rounding has left of it
(`nlscale.levels.feedback`) is a part of a mean. A window of W tokens takes what one of W_0 has left
times W / W_0, or a short one, the last of a run say, would make far too much of it. What it owes
crosses before the ranks have agreed on its last step: W counts that step as planned. With
`levels.reduction=every-step` what the first step of a window has left goes on in its other steps as
it is, as it belongs to the same sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nlscale.config.curriculum import curriculum, tokens_until
from nlscale.config.vocabulary import Config, Reduction
from nlscale.levels.progress import Progress
from nlscale.levels.spectrum import INTEGER_BITS, Level, SyncGroup
from nlscale.levels.window import Window


class Owing:
    """What the sync groups owe, the same on every rank but for the tensors.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        nodes: over which gradients are summed.
        windows: of this rank.
        progress: of all groups of the model.
    """

    def __init__(
        self,
        config: Config,
        levels: Sequence[Level],
        nodes: int,
        windows: Sequence[Window],
        progress: Mapping[SyncGroup, Progress],
    ) -> None:
        self._levels, self._nodes = levels, nodes
        self._windows, self._progress = windows, progress
        self._stages, self._steps = curriculum(config), config.train.steps
        self._every_step = nodes > 1 and config.levels.reduction == Reduction.every_step

    def rounds(self, level: int) -> bool:
        """Whether what a level sends crosses as integers, and leaves something."""
        return self._nodes > 1 and self._levels[level].wire in INTEGER_BITS

    def bring_to_step(self, step: int, closing: Iterable[SyncGroup]) -> None:
        """Before a step: into a window of its tokens so far and those planned until it closes.

        Args:
            step: counted from 1.
            closing: groups whose windows close with it.
        """
        until = tokens_until(self._stages, step - 1)
        for group in self._progress if self._every_step else closing:
            if self._every_step and self._progress[group].counted_tokens:
                continue
            closes = min(group.closes_after(step), self._steps)
            planned = tokens_until(self._stages, closes) - until
            self._bring(group, self._progress[group].tokens + planned)

    def bring_to_windows(self, groups: Iterable[SyncGroup]) -> None:
        """Before these cross, or are closed, with what is in their windows and no step."""
        for group in () if self._every_step else groups:
            self._bring(group, self._progress[group].tokens)

    def update(self, group: SyncGroup) -> None:
        """An update is made by the window of a group, which is about to be emptied.

        What a run before has left is in it where this one leaves nothing, and is let go of.
        """
        progress, level = self._progress[group], self._levels[group.level]
        if not level.local and not self.rounds(group.level):
            progress.owed_tokens = 0
            for window in self._windows:
                if window.group == group:
                    window.owed = None
        if self._every_step and progress.owed_tokens:
            progress.owed_tokens = progress.tokens

    def _bring(self, group: SyncGroup, tokens: int) -> None:
        progress = self._progress[group]
        # What crosses of a local level is no sum over tokens.
        if self._levels[group.level].local or not (
            self.rounds(group.level) or progress.owed_tokens
        ):
            return
        if progress.owed_tokens not in (0, tokens):
            for window in self._windows:
                if window.group == group and window.owed is not None:
                    window.owed.multiply(tokens / progress.owed_tokens)
        progress.owed_tokens = tokens
