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
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nlscale.config.level_optimizer import of_level
from nlscale.config.vocabulary import ClipScope, Config, Reduction, Sharding
from nlscale.levels.groups import group_parameters
from nlscale.levels.homes import homes
from nlscale.levels.noise import GradientNoise, StepSquares, noise_record, see_windows
from nlscale.levels.norms import moved_norms, window_norms
from nlscale.levels.optimizers import (
    GroupOptimizer,
    main_parameters,
    make_group_optimizer,
    split_by_group,
)
from nlscale.levels.passes import group_matrices, matrix_crossing_bytes
from nlscale.levels.progress import Progress
from nlscale.levels.spectrum import Level, SyncGroup, gathered_bytes, reduction_bytes
from nlscale.levels.window import Window, shard_norms, take_step
from nlscale.levels.wire import Waited, Wire
from nlscale.model.decoder import Decoder, named_parameters
from nlscale.ops.transfer import HostCopy
from nlscale.optim.period import at_period, decay_at, set_memories
from nlscale.optim.schedule import learning_rate, update_warmup
from nlscale.parallel import cpu
from nlscale.parallel.consensus import Consensus, Verdict
from nlscale.parallel.layout import Layout
from nlscale.parallel.replicas import data_parallel_group, first_difference

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
        where = homes(config, self.rules, groups, layout.nodes)
        self.wire = Wire(layout, gathered_bytes(config), where)
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
            )
            for group, parameters in groups.items()
        ]
        self._sizes = group_parameters(config, levels, vocabulary, config.levels.stagger)
        self.progress = {group: Progress() for group in self._sizes}
        parameters: dict[str, Any] = named_parameters(stages)
        self._partial = [p for p in parameters.values() if p.partial_gradient]
        self._waited: list[Waited] = []
        self._sent_again = 0.0
        """Bytes of windows that crossed a second time after the last step."""
        stagger, depths = config.levels.stagger, range(config.model.layers)
        self._whole = {m.group: m for m in group_matrices(config, levels, stagger, depths)}
        self._of_matrices = 0.0
        """Bytes of matrices that crossed in the updates of the last step."""
        self._squares: StepSquares | None = None
        if layout.nodes > 1 or levels[-1].period > 1:  # windows of more than one part
            repeats = layout.tensor_rank > 0
            self._squares = StepSquares(self.groups, [*self.progress], repeats, layout.device)

    @property
    def windows(self) -> list[Window]:
        return [g.window for g in self.groups]

    @property
    def alike_on_nodes(self) -> bool:
        """Whether each node has all that updates the parameters, and not a part of it."""
        return self.config.parallel.shard_optimizer == Sharding.node

    def start_step(self, step: int) -> None:
        """Before the first backward pass of a step, counted from 1."""
        closing = self._closing(step)
        self._of_matrices = 0.0
        if self._squares is not None:
            self._squares.start_step()
        for window in self.windows:
            window.start_step(closes=window.group in closing)

    def finish_backward(self) -> None:
        """Sum the step's gradient inside the node."""
        for window in self.windows:
            window.finish_step()
        self._sum_partial_gradients()

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
        counted = {
            group: torch.where(
                consensus.admitted, consensus.counted_tokens + progress.counted_tokens, 0.0
            )
            for group, progress in self._closing(step).items()
        }
        self._settle(counted)
        return self._apply(step, counted)

    def _settle(self, counted: dict[SyncGroup, Tensor]) -> None:
        """Of windows that close, let go of what they have sent where they hold targets that count.

        One that holds none updates nothing, and what it has sent was in vain.
        """
        for window in self.windows:
            if window.group in counted:
                window.settle(counted[window.group] > 0)

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
        self._sent_again = 0.0
        squares = verdict.squares or [0.0] * len(self.progress)
        for (group, progress), square in zip(self.progress.items(), squares, strict=True):
            progress.reductions += every_step or group in update.rates
            if verdict.admitted:
                progress.tokens += verdict.tokens
                progress.counted_tokens += verdict.counted_tokens
                progress.noise.add(square, verdict.counted_tokens, self.layout.nodes)
        if not verdict.admitted:
            return self._close_without(update)
        return self._count(update)

    def _close_without(self, update: Update) -> dict[int, dict[str, float | None]]:
        """Close the windows that are due after a step that was not admitted."""
        deferred = self.config.levels.reduction == Reduction.deferred
        held = {group: self.progress[group] for group in update.rates}
        held = {group: progress for group, progress in held.items() if progress.tokens}
        if not held:
            return {}
        for window in self.windows:
            if window.group in held:
                window.close_without_step()
        self._waited.append(self.wire.finish())
        for group, progress in held.items():
            progress.reductions += deferred
            self._sent_again += deferred * self._bytes(group, self._sizes[group])
        device = self.layout.device
        counted = {
            group: torch.tensor(float(progress.counted_tokens), device=device)
            for group, progress in held.items()
        }
        self._settle(counted)
        return self._count(self._apply(update.step, counted))

    def _apply(self, step: int, tokens: dict[SyncGroup, Tensor]) -> Update:
        """Step groups by what is in their gradient buffers, the sum over that many tokens.

        A group with none of them is left as it is.
        """
        due = [g for g in self.groups if g.group in tokens]
        for g in due:
            with cpu.cuda_by_name():
                g.optimizer.prepare_grads()
        norms = window_norms(due, tokens, len(self.levels), self.layout)
        norms_for_host = HostCopy(norms)
        compared = {g for g in tokens if self.progress[g].updates % _RATIO_EVERY == 0}
        measured = [g for g in due if g.group in compared]
        before = [[p.detach().clone() for p in main_parameters(g)] for g in measured]
        rates = {group: self._rate(group, step) for group in tokens}
        for g in due:
            count = tokens[g.group]
            g.window.scale(self._clip_factor(norms, g.group.level) / count.clamp(min=1))
            inner: Any = g.optimizer.optimizer
            # What torch's gradient scaler sets where the optimizer is to change nothing at all.
            inner.found_inf = (count == 0).to(torch.float32)
            inner.updates = self.progress[g.group].updates
            period = g.group.period_at(step)
            self._set_memories(g, period)
            for param_group in inner.param_groups:
                rate = param_group["lr"] = rates[g.group] * param_group["lr_mult"]
                decay = param_group["decay"]
                param_group["weight_decay"] = decay_at(
                    self.rules[g.group.level], decay, rate, period
                )
            with cpu.cuda_by_name():
                g.optimizer.step_with_ready_grads()
        self._of_matrices += sum(self._crossing(group) for group in tokens)
        moved = None
        if compared:
            moved = HostCopy(moved_norms(measured, before, len(self.levels), self.layout))
        return Update(step, rates, norms_for_host, moved)

    def _rate(self, group: SyncGroup, step: int) -> float:
        rule = self.rules[group.level]
        rate = learning_rate(rule, step, self.config.train.steps)
        warmup = update_warmup(rule, self.progress[group].updates)
        return rate * self.levels[group.level].scale_at(group.period_at(step)) * warmup

    def _set_memories(self, g: GroupOptimizer, period: int) -> None:
        """Give a group's optimizer the betas of an update of a period, where that changes."""
        if g.group.changes is not None and self.rules[g.group.level].betas_by_period:
            own = at_period(self._sections[g.group.level], period)
            made = self.progress[g.group].memory_updates(g.group.period, period)
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
                progress.updates += 1
                progress.short += group.period - group.period_at(update.step)
                done[group.level] = rate
                closed.setdefault(group.level, []).append(progress.noise)
            progress.tokens = progress.counted_tokens = 0
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
        """The groups whose windows close with a step: those due; with the last, all."""
        last = step == self.config.train.steps
        return {g: progress for g, progress in self.progress.items() if last or g.due(step)}

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
        have one part each: no batch of another size is there to compare with."""
        if self.layout.nodes == 1 and self.levels[level].period == 1:
            return {}
        return noise_record([p.noise for group, p in self.progress.items() if group.level == level])

    def traffic(self, step: int) -> tuple[float, float]:
        """Inter-node bytes that a node sent at the last step, and that it did not have to send.

        Gradients, and what updates of whole matrices send, mean over the nodes, as `nlscale plan`
        counts them; the second because groups are not due.
        """
        deferred = self.config.levels.reduction == Reduction.deferred
        sent, saved, closing = 0.0, 0.0, self._closing(step)
        for group, parameters in self._sizes.items():
            crossing = self._bytes(group, parameters)
            if deferred and group not in closing:
                saved += crossing
            else:
                sent += crossing
        return sent + self._sent_again + self._of_matrices, saved

    def _crossing(self, group: SyncGroup) -> float:
        """Bytes of matrices that leave a node, mean over the nodes, in a group's next update."""
        if group not in self._whole:
            return 0.0
        values = self._whole[group].values()
        own, nodes = values[self.progress[group].updates % len(values)], self.layout.nodes
        return matrix_crossing_bytes(self.config, own, nodes) * nodes / self.layout.all_nodes

    def _bytes(self, group: SyncGroup, parameters: int) -> float:
        """That leave a node, the mean over the nodes, when parameters of a group cross."""
        wire, nodes = self.levels[group.level].wire, self.layout.nodes
        sent = reduction_bytes(parameters, nodes, wire, gathered_bytes(self.config))
        return sent * nodes / self.layout.all_nodes

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

        Args:
            parameters: this rank's, by name.
        """
        named = {name: p.detach() for name, p in parameters.items()}
        whole = {n: p for n, p in named.items() if not parameters[n].tensor_model_parallel}
        different = first_difference(self.layout, named, data_parallel_group())
        if different is None and whole:
            different = first_difference(self.layout, whole, self.layout.tensor_group)
        if different is None and self.layout.across_nodes is not None and self.alike_on_nodes:
            state = {
                f"{key} of the optimizer, level {g.group.level} phase {g.group.phase}, shard {i}": v
                for g in self.groups
                for i, p in enumerate(main_parameters(g))
                for key, v in {"weights": p, **g.optimizer.optimizer.state[p]}.items()
                if v.dim() > 0  # the step count of a shard is a scalar, equal by construction
            }
            if state:
                different = first_difference(self.layout, state, self.layout.across_nodes)
        return different

    def _sum_partial_gradients(self) -> None:
        """Sum over the tensor-parallel group what its ranks see parts of.

        Of the buffers that the reduction inside the node has gone over: it changes other elements
        of them on other data-parallel ranks, but the same ones on all ranks of a tensor group.
        """
        if not self._partial:
            return
        gradients = [p.main_grad for p in self._partial]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat, group=self.layout.tensor_group)
        sums = flat.split([g.numel() for g in gradients])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _clip_factor(self, norms: Tensor, level: int) -> Tensor:
        clip = self.rules[level].clip
        if clip == 0:
            return torch.ones_like(norms[level])
        joint = self.config.optimizer.clip_scope == ClipScope.joint
        norm = norms.square().sum().sqrt() if joint else norms[level]
        return (clip / (norm + 1e-6)).clamp(max=1.0)
