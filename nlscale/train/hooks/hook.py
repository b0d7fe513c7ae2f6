"""What a hook is, and the run as it sees it. No torch is imported before a run has begun."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nlscale.config.vocabulary import Config, HookConfig
from nlscale.train.hooks.options import NoOptions

if TYPE_CHECKING:
    from nlscale.step.micro_batches import Batch
    from nlscale.step.trainer import Trainer
    from nlscale.telemetry.run import Telemetry
    from nlscale.train.claim import Claim
    from nlscale.train.prepare import Prepared
    from nlscale.train.replay import Replay


@dataclass(frozen=True)
class Running:
    """A run under way. All of it is the same on every rank, but for what a trainer holds."""

    trainer: Trainer
    prepared: Prepared
    telemetry: Telemetry
    claim: Claim
    replay: Replay
    """The samples that are read again."""

    @property
    def config(self) -> Config:
        return self.trainer.config

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.trainer.counters.step

    @property
    def samples(self) -> int:
        """Samples that the run has come to: the global number of the next one."""
        return self.trainer.counters.samples

    def losses(self, numbers: Iterable[int]) -> dict[int, float]:
        """The mean loss of training samples now, nats a token, by their numbers.

        Collective; the ranks share the samples out. One none of whose targets counts is left out.
        """
        from nlscale.train.hooks.asking import losses_of

        return losses_of(self.trainer, self.prepared, list(dict.fromkeys(numbers)))

    def last_sequences(self, count: int) -> list[Batch]:
        """The last training samples that the run has come to, as many as there are up to that
        number: each a micro batch, the same on every rank."""
        from nlscale.train.batches import read

        reader = self.prepared.readers[0]
        numbers = range(max(0, self.samples - count), self.samples)
        return [self.trainer.to_batch(*read(reader, [number])) for number in numbers]

    def record(self, name: str, figures: dict[str, Any], seconds: float) -> None:
        """Put what was found into metrics.jsonl, as an evaluation of that name."""
        import time

        counters = self.trainer.counters
        self.claim.check()
        self.telemetry.evaluation(
            name,
            {
                "kind": "evaluation",
                "step": counters.step,
                "time": time.time(),
                "seconds": seconds,
                "tokens": counters.tokens,
                **figures,
            },
        )


class Hook:
    """Something that is called in the course of a run, the same way on every rank.

    What it has to remember is in `self.noted`, plain values as JSON holds them, and in
    `self.run.trainer.kept`, tensors of each parameter: checkpoints hold both, so that a run that
    resumes goes on as if it had not stopped.

    Args:
        run: under way; what a checkpoint holds is there again.
        given: the entry of `hooks`.
        options: of the class `Options`.
    """

    Options: ClassVar[type] = NoOptions
    """A dataclass of what it can be told, read like a section of a recipe."""
    one_length: ClassVar[bool] = False
    """Whether it numbers samples, and so needs all sequences of the run to have one length."""

    def __init__(self, run: Running, given: HookConfig, options: Any) -> None:
        self.run, self.given, self.options = run, given, options
        self.noted = run.trainer.noted.setdefault(given.name, {})

    def begin(self) -> None:
        """Called once in each start of the run, before its first step."""

    def on_update(self) -> None:
        """Called after a step at which its level has begun an update, once a period; and after its
        `steps`. The step is recorded, and neither validated nor saved yet."""


def chosen(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """The places of names among those that there are.

    Raises:
        ValueError: one is not among them; names the nearest.
    """
    from nlscale.config.schema import nearest

    for name in names:
        if name not in known:
            raise ValueError(f"no level is called {name!r}; {nearest(name, known)}")
    return [known.index(name) for name in names]
