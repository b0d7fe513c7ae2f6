"""What an evaluation of a trained model works with: the ranks, what was done before, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nlscale.evaluate.asking.kept import Kept
from nlscale.evaluate.asking.progress import Progress
from nlscale.evaluate.asking.ranks import Ranks

Advance = Callable[[float], None]
"""Of the units of its size that a part has done since the last call."""


class Part(NamedTuple):
    """A piece of an evaluation that does not depend on the others."""

    name: str
    """Unlike those of all others of the evaluation, and the same whenever it is begun again."""
    size: float
    """How much work it is, in units that progress is told in, such as tokens."""
    of: Any = None
    """Whatever the work needs to know."""


@dataclass(frozen=True)
class Context:
    """Of one evaluation of one model.

    Attributes:
        name: of the evaluation.
        path: the folder of the model, as it was named.
        ranks: `rank`, `world`, `gather` and `broadcast`; a single one, where there is one.
        kept: what was found before.
        progress: shown on the first rank.
    """

    name: str
    path: Path
    ranks: Ranks
    kept: Kept
    progress: Progress

    def parts(
        self,
        parts: Sequence[Part],
        work: Callable[[Part, Advance], Any],
        unit: str = "tokens",
    ) -> list[Any]:
        """What `work` finds of each part, in their order, on every rank.

        Ranks take the parts that are not done, one after the other; what one has found, as JSON
        holds it, is kept at once, and not asked for again after a kill. So the result does not
        depend on the ranks, nor on where it was stopped.

        Args:
            parts: the same on every rank.
            work: of a part, and of a function to call with how much of its size it has done.
            unit: of the sizes.
        """
        known = self.ranks.broadcast(self.kept.parts() if self.ranks.first else None)
        todo = [number for number, part in enumerate(parts) if part.name not in known]
        found: dict[int, Any] = {}

        def keep(number: int, value: Any) -> None:
            found[number] = value
            self.kept.add(parts[number].name, value)

        with self.progress.phase(sum(parts[n].size for n in todo), unit) as advance:
            share = self.ranks.share(len(todo))
            for place in share.mine():
                number = todo[place]
                # The others are as fast, as far as anybody knows.
                value = work(parts[number], lambda done: advance(done * self.ranks.world))
                if self.ranks.first:
                    keep(number, value)
                else:
                    share.hand_in(place, value)
                for other, theirs in share.handed_in():
                    keep(todo[other], theirs)
            for other, theirs in share.rest():
                keep(todo[other], theirs)
        everything = {parts[number].name: value for number, value in found.items()}
        everything = self.ranks.broadcast({**known, **everything} if self.ranks.first else None)
        return [everything[part.name] for part in parts]
