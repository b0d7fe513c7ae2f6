"""Stepping the levels: each sync group when it is due, by its own window gradient.

One megatron-core `DistributedOptimizer` a sync group, sharded over the data-parallel ranks of a
node. The step count of a rule, and its bias correction, count the updates of the group
(docs/concepts/windows.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nlscale.config.level_optimizer import of_level
from nlscale.config.vocabulary import Config, Reduction, Sharding
from nlscale.levels.added import Added
from nlscale.levels.following import Following
from nlscale.levels.groups import group_parameters
from nlscale.levels.homes import homes
from nlscale.levels.noise import GradientNoise, StepSquares, noise_record, see_windows
from nlscale.levels.norms import Norms
from nlscale.levels.optimizers import (
    GroupOptimizer,
    make_group_optimizer,
    split_by_group,
)
from nlscale.levels.owing import Owing
from nlscale.levels.partial import sum_partial_gradients
from nlscale.levels.progress import Counted, Progress
from nlscale.levels.replicas import parameter_difference, state_difference
from nlscale.levels.sent import Sent
from nlscale.levels.spectrum import Level, SyncGroup, gathered_bytes
from nlscale.levels.tiers import rings_of_levels
from nlscale.levels.window import Window, shard_norms, take_step
from nlscale.levels.wire import Waited, Wire
from nlscale.model.decoder import Decoder, named_parameters
from nlscale.ops.transfer import HostCopy
from nlscale.optim.period import at_period, decay_at, set_memories
from nlscale.optim.schedule import learning_rate, update_warmup
from nlscale.parallel import cpu
from nlscale.parallel.consensus import Consensus, Verdict
from nlscale.parallel.layout import Layout

_RATIO_EVERY = 10
"""Updates of a sync group between two measurements of its update-to-weight ratio."""


@dataclass(frozen=True)
class Update:
    """An update that is under way on the device."""

    step: int
    rates: dict[SyncGroup, float]
    """Learning rates of the groups that are due."""
    norms: HostCopy
    """Of the window gradients, by level."""
    moved: HostCopy | None
    """|update| and |weights| by level; None where no ratio is measured."""


class LevelOptimizer:
    """All sync groups of a rank's part of the model, and the progress of all of the model."""

    def __init__(
        self,
        config: Config,
        levels: list[Level],
        stages: list[Decoder],
        vocabulary: int,
        megatron: TransformerConfig,
        layout: Layout,
    ) -> None:
        self.config, self.levels, self.layout = config, levels, layout
        self._sections = [of_level(config, level.index) for level in levels]
        sections = zip(self._sections, levels, strict=True)
        self.rules = [at_period(own, level.period) for own, level in sections]
        """The `optimizer` section as it is for each level, at its longest period."""
        groups = split_by_group(config, levels, stages)
        self._norms = Norms(config, levels, self.rules, layout)
        where = homes(config, self.rules, groups, layout.nodes)
        self.wire = Wire(layout, gathered_bytes(config), where)
        rings = rings_of_levels(config, groups, layout.device)
        self.groups = [
            make_group_optimizer(
                group,
                parameters,
                config,
                self.rules[group.level],
                megatron,
                layout,
                self.wire,
                levels[group.level].wire,
                rings[group.level],
            )
            for group, parameters in groups.items()
        ]
        sizes = group_parameters(config, levels, vocabulary, config.levels.stagger)
        self.sent = Sent(config, levels, sizes, layout)
        self.progress = {group: self._new_progress(group) for group in sizes}
        self.added = Added()
        self.following = Following(
            levels, self.groups, groups, self.progress, config, self.added, self.wire, layout
        )
        self._named = {group: frozenset(own) for group, own in groups.items()}
        parameters: dict[str, Any] = named_parameters(stages)
        self._partial = [p for p in parameters.values() if p.partial_gradient]
        self._owing = Owing(config, levels, layout.nodes, self.windows, self.progress)
        self._waited: list[Waited] = []
        self._crossed: set[SyncGroup] = set()
        """The groups whose gradients, or outer steps, crossed at the last step."""
        self._squares: StepSquares | None = None
        longest = max(level.period for level in levels if level.copy is None)
        if layout.nodes > 1 or longest > 1:  # windows of more than one part
            repeats = layout.tensor_rank > 0
            self._squares = StepSquares(self.groups, [*self.progress], repeats, layout.device)

    @property
    def windows(self) -> list[Window]:
        return [g.window for g in self.groups]

    @property
    def alike_on_nodes(self) -> bool:
        """Whether each node has all that updates the parameters, and not a part of it."""
        return self.config.parallel.shard_optimizer == Sharding.node

    def _new_progress(self, group: SyncGroup) -> Progress:
        nodes = self.layout.nodes if self.is_local(group) else 0
        return Progress(node_counted=[0] * nodes, outer_counted=[0] * nodes)

    def is_local(self, group: SyncGroup) -> bool:
        """Whether each node updates the group by its own gradients."""
        return self.levels[group.level].local

    def _has_gradient(self, group: SyncGroup) -> bool:
        """Whether it has parameters of the model, and no copies of them."""
        return self.levels[group.level].copy is None

    def start_step(self, step: int) -> None:
        """Before the first backward pass of a step, counted from 1."""
        closing = self._closing(step)
        self.sent.begin()
        if self._squares is not None:
            self._squares.start_step()
        self._owing.bring_to_step(step, closing)
        for window in self.windows:
            window.start_step(closes=window.group in closing)

    def finish_backward(self) -> None:
        """Sum the step's gradient inside the node."""
        for window in self.windows:
            window.finish_step()
        sum_partial_gradients(self._partial, self.layout)

    def finish_crossing(self) -> Tensor:
        """What crosses at this step has crossed; whether all gradients are finite, a bool tensor.

        Of what has crossed every node sees the sum, which is not finite where a part of it is not.
        """
        for window in self.windows:
            window.send_rest()
        self._waited = [self.wire.finish()]
        norms = shard_norms(self.windows)
        if self._squares is not None:
            self._squares.finish(norms)
        return torch.isfinite(torch.stack(norms)).all()

    @property
    def squares(self) -> Tensor | None:
        """Of the step, as far as this rank has it, |gradient on this node|^2 of each sync group of
        the model, float64, for the consensus; None where no window has more than one part."""
        return self._squares.of_step if self._squares is not None else None

    def link_seconds(self) -> float:
        """That this rank waited for the link in the last step, once `conclude` has returned."""
        return sum(waited.seconds() for waited in self._waited)

    def update(self, step: int, consensus: Consensus) -> Update:
        """Add the step to the windows and step the groups that are due; at the end, all of them.

        The host asks for all of this before it knows whether the step is admitted: a step that is
        not enters no window, and closes none. `conclude` is to follow.

        Args:
            step: counted from 1.
            consensus: of all ranks on that step.
        """
        take_step(self.windows, consensus.admitted, consensus.counted_tokens > 0)
        admitted, node = consensus.admitted, self.layout.node_rank
        counted = {}
        for group, progress in self._closing(step).items():
            of_all = consensus.counted_tokens + progress.counted_tokens
            here = of_all
            if self.is_local(group):
                here = consensus.node_counted[node] + progress.node_counted[node]
            counted[group] = Counted(*(torch.where(admitted, n, 0.0) for n in (of_all, here)))
        self._settle(counted)
        return self._apply(step, counted)

    def _settle(self, counted: dict[SyncGroup, Counted]) -> None:
        """Of windows that close, let go of what they have sent where they hold targets that count.

        One that holds none updates nothing, and what it has sent was in vain.
        """
        for window in self.windows:
            if window.group in counted:
                window.settle(counted[window.group].of_all > 0)

    def conclude(self, update: Update, verdict: Verdict) -> dict[int, dict[str, float | None]]:
        """Note where the groups stand after an update, once the verdict on its step is known.

        A window that was to close with a step that was not admitted is closed now, with the steps
        before it: what has crossed was in vain, and its sums cross again. The host waits for the
        norms, and for the whole update where a ratio is measured.

        Returns:
            For each level that updated: its learning rate, the norm of its window gradient before
            clipping, and the norm of its update over that of its weights (None at the updates at
            which that is not measured: all but every tenth).
        """
        every_step = self.config.levels.reduction == Reduction.every_step
        squares = verdict.squares or [0.0] * len(self.progress)
        self._crossed = {
            group
            for group in self.progress
            if group in update.rates or (every_step and self._has_gradient(group))
            if not self.is_local(group)
        }
        for (group, progress), square in zip(self.progress.items(), squares, strict=True):
            progress.reductions += group in self._crossed
            if verdict.admitted:
                progress.take(verdict)
                progress.noise.add(square, verdict.counted_tokens, self.layout.nodes)
        told = self._count(update) if verdict.admitted else self._close_without(update)
        followed = self.following.make(update.step)
        self._crossed |= followed.crossed
        self._waited += followed.waited
        for level, rate in followed.copied.items():
            told[level] = {"learning_rate": rate, "grad_norm": None, "update_ratio": None}
        return told

    def _close_without(self, update: Update) -> dict[int, dict[str, float | None]]:
        """Close the windows that are due after a step that was not admitted."""
        deferred = self.config.levels.reduction == Reduction.deferred
        held = {group: self.progress[group] for group in update.rates}
        held = {group: progress for group, progress in held.items() if progress.tokens}
        if not held:
            return {}
        self._owing.bring_to_windows(held)
        for window in self.windows:
            if window.group in held:
                window.close_without_step()
        self._waited.append(self.wire.finish())
        counted, node = {}, self.layout.node_rank
        for group, progress in held.items():
            of_all = here = progress.counted_tokens
            if self.is_local(group):
                here = progress.node_counted[node]
            elif deferred:
                progress.reductions += 1
                self.sent.again(group)
            counts = (torch.tensor(float(n), device=self.layout.device) for n in (of_all, here))
            counted[group] = Counted(*counts)
        self._settle(counted)
        return self._count(self._apply(update.step, counted))

    def _apply(self, step: int, counted: dict[SyncGroup, Counted]) -> Update:
        """Step groups by what is in their gradient buffers, the sum over that many targets.

        A group with none of them is left as it is.
        """
        due = [g for g in self.groups if g.group in counted]
        for g in due:
            with cpu.cuda_by_name():
                g.optimizer.prepare_grads()
            self.added.to_gradients(g, counted[g.group].here)
        norms = self._norms.of_windows(due, counted)
        norms_for_host = HostCopy(norms)
        compared = {g for g in counted if self.progress[g].updates % _RATIO_EVERY == 0}
        measured = [g for g in due if g.group in compared]
        before = [g.keep_weights() for g in measured]
        rates = {group: self._rate(group, step) for group in counted}
        brings = self.following.brings(step)
        for g in due:
            count = counted[g.group]
            # A node none of whose targets counts makes its own update by a gradient of zero.
            g.window.scale(self._norms.clip_factor(norms, g.group.level) / count.here.clamp(min=1))
            inner: Any = g.optimizer.optimizer
            # What torch's gradient scaler sets where the optimizer is to change nothing at all.
            inner.found_inf = (count.of_all == 0).to(torch.float32)
            inner.updates = self.progress[g.group].updates
            period = g.group.period_at(step)
            self._set_memories(g, period)
            for param_group in inner.param_groups:
                rate = param_group["lr"] = rates[g.group] * param_group["lr_mult"]
                decay = param_group["decay"]
                param_group["weight_decay"] = decay_at(
                    self.rules[g.group.level], decay, rate, period
                )
            self.following.begin(g.group)
            with cpu.cuda_by_name():
                # What something is to follow is brought into the model by that.
                step_one = inner.step if g.group in brings else g.optimizer.step_with_ready_grads
                step_one()
        for group in counted:
            self.sent.matrices(group, self.progress[group].updates)
        moved = HostCopy(self._norms.moved(measured, before)) if compared else None
        return Update(step, rates, norms_for_host, moved)

    def _rate(self, group: SyncGroup, step: int) -> float:
        rule = self.rules[group.level]
        rate = learning_rate(rule, step, self.config.train.steps)
        warmup = update_warmup(rule, self.progress[group].updates)
        warmup *= self.added.factor(group.level)
        return rate * self.levels[group.level].scale_at(group.period_at(step)) * warmup

    def _set_memories(self, g: GroupOptimizer, period: int) -> None:
        """Give a group's optimizer the betas of an update of a period, where that changes, or has
        changed: in a run before the one that goes on."""
        progress, by_period = self.progress[g.group], self.rules[g.group.level].betas_by_period
        if by_period and (g.group.changes is not None or progress.short):
            own = at_period(self._sections[g.group.level], period)
            made = progress.memory_updates(g.group.period, period)
            set_memories(g.optimizer.optimizer, own, made)

    def _count(self, update: Update) -> dict[int, dict[str, float | None]]:
        """Note that the groups of an update have made it, and read what is told of it.

        A group in whose window no target counts has made none, and begins another window.
        """
        done: dict[int, float] = {}
        closed: dict[int, list[GradientNoise]] = {}
        for group, rate in update.rates.items():
            progress = self.progress[group]
            if progress.counted_tokens:
                self._owing.update(group)
            if progress.close(outer=self.levels[group.level].outer is not None):
                progress.short += group.period - group.period_at(update.step)
                done[group.level] = rate
                if not self.is_local(group) and not self._owing.rounds(group.level):
                    closed.setdefault(group.level, []).append(progress.noise)
        norms = update.norms.read()
        for level, windows in closed.items():
            see_windows(windows, norms[level] ** 2)
        for group in update.rates:
            self.progress[group].noise.clear()
        none = [0.0] * len(self.levels)
        moved, weights = update.moved.read() if update.moved is not None else (none, none)
        return {
            level: {
                "learning_rate": rate,
                "grad_norm": norms[level],
                "update_ratio": moved[level] / weights[level] if weights[level] else None,
            }
            for level, rate in done.items()
        }

    def _closing(self, step: int) -> dict[SyncGroup, Progress]:
        """The groups that update at the end of a step: those due; with the last, all."""
        last = step == self.config.train.steps
        return {
            g: progress
            for g, progress in self.progress.items()
            if (last or g.due(step)) and self._has_gradient(g)
        }

    def gather_parameters(self) -> None:
        """Set the model's parameters to what updates them, whose shards were set from outside."""
        with torch.no_grad(), cpu.cuda_by_name():
            for g in self.groups:
                g.optimizer.gather_parameters()

    def counts(self, level: int) -> tuple[int, int]:
        """Updates and reductions of a level: of that of its sync groups that made most."""
        mine = [p for group, p in self.progress.items() if group.level == level]
        return max(p.updates for p in mine), max(p.reductions for p in mine)

    def noise(self, level: int) -> dict[str, float | None]:
        """What a train record says of the noise of a level's gradient; nothing where its windows
        have one part each, no batch of another size being there to compare with; of a local level,
        whose nodes have norms of their own; where the nodes' weights differ in one; and of one that
        crosses as integers: the mean over all nodes holds what those have rounded, and its square
        would count as signal."""
        own, nodes = self.levels[level], self.layout.nodes
        differ = nodes > 1 and any(other.local for other in self.levels)
        if (
            own.copy is not None
            or own.local
            or self._owing.rounds(level)
            or differ
            or (nodes == 1 and own.period == 1)
        ):
            return {}
        return noise_record([p.noise for group, p in self.progress.items() if group.level == level])

    def outer_steps(self, level: int) -> int:
        """Of a level: of that of its sync groups that made most."""
        return max(p.outer_steps for group, p in self.progress.items() if group.level == level)

    def traffic(self) -> tuple[float, float]:
        """Inter-node bytes that a node sent at the last step, and that it did not have to send.

        Gradients, and what updates of whole matrices send, mean over the nodes, as `nlscale plan`
        counts them; the second because groups are not due.
        """
        return self.sent.end(self._crossed)

    def window_fill(self, level: int, step: int, tokens_until: Callable[[int], int]) -> float:
        """Share of its tokens that the fullest window of a level holds now, 0 to 1.

        Args:
            level: which.
            step: the last that was taken.
            tokens_until: planned, of the first steps of the run.
        """
        return max(
            progress.tokens / group.window_tokens(step, tokens_until)
            for group, progress in self.progress.items()
            if group.level == level
        )

    def replica_difference(self, parameters: dict[str, Any]) -> str | None:
        """The first parameter, or optimizer state, that replicas do not share bit for bit.

        Of a local level nodes share the weights right after an outer step, and what outer steps
        keep; the ranks of a node share all of it.

        Args:
            parameters: this rank's, by name.
        """
        local = {group for group in self.progress if self.is_local(group)}
        apart = {group for group in local if self.progress[group].outer_updates}
        names = {name for group in apart & self._named.keys() for name in self._named[group]}
        different, state = parameter_difference(self.layout, parameters, names), None
        if self.alike_on_nodes:
            state = state_difference(self.layout, self.groups, self.following, local, apart)
        return state if different is None else different
