"""Training that keeps an account: what gradients there were, and what of them has been sent."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from levels.level_runs import VOCABULARY, load, sequences, spoiled_gradient
from torch import Tensor

from nlscale.levels.spectrum import spectrum
from nlscale.parallel.consensus import Verdict
from nlscale.parallel.layout import Layout, process_groups
from nlscale.step.micro_batches import Batch, LossMask
from nlscale.step.trainer import Trainer


class Account:
    """Of every sync group of a rank, in float64: gradients of admitted steps, summed in this node,
    and what updates were given, before it was scaled. To be made where nothing overlaps.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.layout = trainer, trainer.layout
        windows = trainer.optimizer.windows
        self.gradients = [[torch.zeros_like(s, dtype=torch.float64) for s in w.shards]
                          for w in windows]  # fmt: skip
        self.sent = [[torch.zeros_like(x) for x in shards] for shards in self.gradients]
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

    def begin(self, deviation: float) -> None:
        """Let every window owe something, as if steps before had left it."""
        torch.manual_seed(self.layout.rank)
        for i, window in enumerate(self.trainer.optimizer.windows):
            for total, error in zip(self.gradients[i], window.begin_owed().errors, strict=True):
                total += error.normal_(std=deviation)

    def take_step(self, batches: list[Any]) -> Verdict:
        """A step of the trainer."""
        self._given.clear()
        progress = self.trainer.optimizer.progress
        windows = self.trainer.optimizer.windows
        before = [progress[w.group].updates for w in windows]
        verdict, _ = self.trainer.take_step(batches)
        for i, window in enumerate(windows):
            if verdict.admitted:
                for total, step in zip(self.gradients[i], self._step[i], strict=True):
                    total += step
            if progress[window.group].updates > before[i]:
                for total, given in zip(self.sent[i], self._given[i], strict=True):
                    total += given
        return verdict

    def sums(self) -> float:
        """Of the last step, the norm of this node's gradient, added up over the nodes."""
        squares = [x.square().sum() for step in self._step for x in step]
        return float(_over_nodes(torch.stack(squares).sum().sqrt(), self.layout))

    def gap(self) -> float:
        """The largest |gradients - sent - pending - owed| of a shard, of |gradients| + |owed|."""
        worst = 0.0
        every_step = self.trainer.config.levels.reduction.value == "every-step"
        for i, window in enumerate(self.trainer.optimizer.windows):
            for j, gradient in enumerate(self.gradients[i]):
                mine = torch.zeros_like(gradient)
                for own in self.trainer.optimizer.wire.owned(window.cuts[j], len(mine)):
                    mine[own] = 1.0
                if self.trainer.optimizer.alike_on_nodes and self.layout.node_rank > 0:
                    mine.zero_()  # what all nodes have alike counts once
                sent = self.sent[i][j] * mine
                if window.sums is not window.shards:
                    pending = window.sums[j].double()
                    sent += pending * mine if every_step else pending
                owed = torch.zeros_like(gradient)
                if window.owed is not None:
                    owed += window.owed.errors[j]
                    if window.owed.owned is not None:
                        owed[slice(*window.owed.owned[j])] += window.owed.totals[j]
                gap = _over_nodes(gradient - sent - owed, self.layout).norm()
                size = _over_nodes(gradient, self.layout).norm()
                worst = max(worst, (gap / size).item() if size else gap.item())
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
        step; `owed`: the sum of squares of what this node owes at the end, and `owed_bytes` of
        tensors for it; `elements` of the model's part; `bytes` that the wire counted, of a node,
        and `planned`.
    """
    found = []
    for keys in overrides:
        config = load([*keys, "parallel.overlap=false"])
        with process_groups(config) as layout:
            levels = spectrum(config.levels, tokens_per_step=100)
            trainer = Trainer.build(config, layout, levels, VOCABULARY)
            account, named = Account(trainer), trainer.named_parameters()
            if owes:
                account.begin(owes)
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
