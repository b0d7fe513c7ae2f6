"""A hook: a buffer of the hardest samples, refreshed each time that a level updates.

nlscale train quickstart --import examples.hardest "hooks=[{name: hardest, level: slow}]"
"""

from nlscale.train.hooks import Hook, register


class Hardest(Hook):
    """A quarter of each step is read from the 32 samples that the model finds hardest."""

    one_length = True

    def on_update(self) -> None:
        new = range(max(0, self.run.samples - 64), self.run.samples)
        losses = self.run.losses([*self.run.replay.numbers, *new])
        hardest = sorted(losses, key=losses.__getitem__, reverse=True)[:32]
        self.run.replay.fill(hardest, share=0.25)
        self.run.record("hardest", {"loss": losses[hardest[0]]}, seconds=0.0)


register("hardest", Hardest)
