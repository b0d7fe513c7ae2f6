"""Training that keeps an account: what gradients there were, and what of them has been sent."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from levels.level_runs import VOCABULARY, load, sequences, spoiled_gradient
from torch import Tensor

from nlscale.levels.spectrum import levels_of
from nlscale.parallel.consensus import Verdict
from nlscale.parallel.layout import Layout, process_groups
from nlscale.step.micro_batches import Batch, LossMask
from nlscale.step.trainer import Trainer

OWED_TOKENS = 80
"""Of the window that has left what is owed before the first step."""


class Account:
    """Of every sync group of a rank, in float64: gradients of admitted steps, summed in this node,
    and what updates were given, before it was scaled. To be made where nothing overlaps.

    What updates have lacked so far, `left`, is a part of a mean: it is counted in sums of as many
    tokens as the window has that crosses.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.layout = trainer, trainer.layout
        windows = trainer.optimizer.windows
        self.gradients, self.pending, self.left = (
            [[torch.zeros_like(s, dtype=torch.float64) for s in w.shards] for w in windows]
            for _ in range(3)
        )
        self._tokens = [0] * len(windows)
        """In the windows."""
        self._counted = [0] * len(windows)
        """Targets among them."""
        self._of = [0.0] * len(windows)
        """Tokens in whose sums `left` is counted; 0: nothing is."""
        every_step = trainer.config.levels.reduction.value == "every-step"
        self._every_step = every_step and self.layout.nodes > 1
        self.missed: list[float] = []
        """By update, all sync groups after each other: |gradient - what it was given| of
        |gradient|, the largest of a shard."""
        self._given: dict[int, list[Tensor]] = {}
        self._step: list[list[Tensor]] = []
        finish = trainer.optimizer.finish_crossing

        def before_crossing() -> Tensor:
            self._step = [[s.double() for s in w.shards] for w in windows]
            return finish()

        trainer.optimizer.finish_crossing = before_crossing  # type: ignore[method-assign]
        for i, window in enumerate(windows):
            self._note_given(i, window)

    def _note_given(self, i: int, window: Any) -> None:
        scale = window.scale

        def note(factor: Tensor) -> None:
            self._given[i] = [s.double() for s in window.shards]
            scale(factor)

        window.scale = note

    def begin(self, deviation: float, tokens: int) -> None:
        """Let every window owe something, as if one of so many tokens before had left it."""
        torch.manual_seed(self.layout.rank)
        for i, window in enumerate(self.trainer.optimizer.windows):
            self.trainer.optimizer.progress[window.group].owed_tokens = tokens
            self._of[i] = tokens
            errors = window.begin_owed().errors
            for left, total, error in zip(self.left[i], self.gradients[i], errors, strict=True):
                left += error.normal_(std=deviation)
                total += error

    def take_step(self, batches: list[Any]) -> Verdict:
        """A step of the trainer."""
        self._given.clear()
        progress = self.trainer.optimizer.progress
        windows = self.trainer.optimizer.windows
        before = [progress[w.group].updates for w in windows]
        verdict, _ = self.trainer.take_step(batches)
        for i, window in enumerate(windows):
            closes = self._cross(i, window.group, verdict.admitted)
            if verdict.admitted:
                self._tokens[i] += verdict.tokens
                self._counted[i] += verdict.counted_tokens
                for total, pending, step in zip(
                    self.gradients[i], self.pending[i], self._step[i], strict=True
                ):
                    total += step
                    pending += step
            if closes:
                if self._counted[i] and self._every_step:
                    self._of[i] = self._tokens[i]
                self._tokens[i] = self._counted[i] = 0
            if progress[window.group].updates > before[i]:
                missed = 0.0
                for j, given in enumerate(self._given[i]):
                    lacks = self.pending[i][j] - given * self._mine(i, j)
                    both = (_over_nodes(x, self.layout).norm() for x in (lacks, self.pending[i][j]))
                    missed = max(missed, float(next(both) / next(both)))
                    self.left[i][j] += lacks
                    self.pending[i][j].zero_()
                self.missed.append(missed)
        return verdict

    def _cross(self, i: int, group: Any, admitted: bool) -> bool:
        """Count what is left in the sums that cross at the step now over; whether they close."""
        config, step = self.trainer.config, self.trainer.counters.step
        last, closes = config.train.steps, step
        while closes < last and not group.due(closes):
            closes += 1
        a_step = config.train.global_batch * config.data.sequence_length
        if closes == step if not self._every_step else not self._counted[i]:
            self._count_in(i, self._tokens[i] + (closes - step + 1) * a_step)
        again = closes == step and not self._every_step and not admitted
        if again and self._tokens[i]:
            self._count_in(i, self._tokens[i])
        return closes == step

    def _count_in(self, i: int, tokens: int) -> None:
        for left in self.left[i]:
            left *= tokens / (self._of[i] or tokens)
        self._of[i] = tokens

    def _mine(self, i: int, j: int) -> Tensor:
        """Of a shard that nodes may have alike, 1 where this one's counts."""
        mine = torch.zeros_like(self.gradients[i][j])
        optimizer = self.trainer.optimizer
        if not optimizer.alike_on_nodes or self.layout.node_rank == 0:
            for own in optimizer.wire.owned(optimizer.windows[i].cuts[j], len(mine)):
                mine[own] = 1.0
        return mine

    def sums(self) -> float:
        """Of the last step, the norm of this node's gradient, added up over the nodes."""
        squares = [x.square().sum() for step in self._step for x in step]
        return float(_over_nodes(torch.stack(squares).sum().sqrt(), self.layout))

    def gap(self) -> float:
        """The largest |left + gradients of the window - window - owed| of a shard, of |gradients of
        all steps, and what was owed before them|."""
        worst = 0.0
        for i, window in enumerate(self.trainer.optimizer.windows):
            for j, gradient in enumerate(self.gradients[i]):
                gap = self.left[i][j] + self.pending[i][j]
                if window.sums is not window.shards:
                    held = window.sums[j].double()
                    gap -= held * self._mine(i, j) if self._every_step else held
                if window.owed is not None:
                    gap -= window.owed.errors[j]
                    if window.owed.owned is not None:
                        gap[slice(*window.owed.owned[j])] -= window.owed.totals[j]
                over, size = (_over_nodes(x, self.layout).norm() for x in (gap, gradient))
                worst = max(worst, (over / size).item() if size else over.item())
        return worst


def _over_nodes(values: Tensor, layout: Layout) -> Tensor:
    values = values.clone()
    if layout.across_nodes is not None:
        dist.all_reduce(values, group=layout.across_nodes)
    return values


def run_with_account(
    overrides: list[list[str]],
    spoil: dict[int, int],
    masked: tuple[int, ...] = (),
    owes: float = 0.0,
    again: bool = False,
) -> list[dict[str, Any]]:
    """On a rank of a world: some runs, one after the other, with an account of each.

    Args:
        overrides: of each run.
        spoil: at step s, rank r gets a NaN into its gradient.
        masked: steps of which no target counts.
        owes: standard deviation of what is owed before the first step, whatever the format.
        again: every step is of the sequences of the first, of which it learns.

    Returns:
        Of each run, by step: `gaps`, `admitted` and `losses`; `sums`: of the norms of the nodes'
        gradients, over the targets; and `different`: what replicas do not share, by
        step; `missed`, of `Account`; `owed`: the sum of squares of what this node owes at the end,
        and `owed_bytes` of tensors for it; `elements` of the model's part; `bytes` that the wire
        counted, of a node, and `planned`.
    """
    found = []
    for keys in overrides:
        config = load([*keys, "parallel.overlap=false"])
        with process_groups(config) as layout:
            levels = levels_of(config)
            trainer = Trainer.build(config, layout, levels, VOCABULARY)
            account, named = Account(trainer), trainer.named_parameters()
            if owes:
                account.begin(owes, OWED_TOKENS)
            run: dict[str, Any] = {
                name: [] for name in ("gaps", "admitted", "different", "losses", "sums")
            }
            for step in range(1, config.train.steps + 1):
                batches = sequences(config, 1 if again else step)[
                    layout.data_rank :: layout.data_size
                ]
                if step in masked:
                    batches = [_uncounted(batch) for batch in batches]
                spoils = spoil.get(step) == layout.rank
                with spoiled_gradient(trainer.stages[-1]) if spoils else nullcontext():
                    verdict = account.take_step(batches)
                run["admitted"].append(verdict.admitted)
                run["losses"].append(verdict.loss)
                run["sums"].append(account.sums() / max(1, verdict.counted_tokens))
                run["gaps"].append(account.gap())
                run["different"].append(trainer.optimizer.replica_difference(named))
            run["missed"] = account.missed
            owed = [w.owed for w in trainer.optimizer.windows if w.owed is not None]
            run["owed"] = sum(e.square().sum().item() for o in owed for e in o.errors)
            run["owed_bytes"] = sum(2 * e.nbytes for o in owed for e in (*o.errors, *o.totals))
            run["elements"] = sum(p.numel() for p in named.values())
            of_ranks: list[Any] = [None] * layout.world
            dist.all_gather_object(of_ranks, trainer.optimizer.wire.bytes)
            run["bytes"] = sum(of_ranks) / layout.all_nodes
            run["planned"] = trainer.counters.bytes_sent
            found.append(run)
    return found


def _uncounted(batch: Batch) -> Batch:
    nothing = torch.zeros(batch.targets.shape, dtype=torch.bool)
    return batch._replace(mask=LossMask(nothing, 0))
