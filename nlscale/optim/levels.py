"""Stepping the levels: each sync group when it is due, by its own window gradient (MATH 1).

One megatron-core `DistributedOptimizer` a sync group, sharded over the data-parallel ranks of a
node. Adam's step count and bias correction are those of the group: they count its updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config import ClipScope, Config, Dtype, OptimizerConfig, Reduction
from nlscale.levels import Level, SyncGroup, reduction_bytes, sync_group
from nlscale.model.hope import Hope
from nlscale.optim.schedule import learning_rate, update_warmup
from nlscale.parallel import cpu
from nlscale.parallel.layout import Layout
from nlscale.parallel.replicas import data_parallel_group, first_difference
from nlscale.parallel.window import Window, reduce_across_nodes

_RATIO_EVERY = 10
"""Updates between two measurements of the update-to-weight ratio of a level of period 1."""


@dataclass
class GroupOptimizer:
    """A sync group's window and the optimizer that applies it."""

    window: Window
    optimizer: DistributedOptimizer
    parameters: int
    """Parameters of this rank's part of the model in the group, over its data-parallel ranks."""
    updates: int = 0
    reductions: int = 0

    @property
    def group(self) -> SyncGroup:
        return self.window.group


class LevelOptimizer:
    """All sync groups of a rank's part of the model."""

    def __init__(
        self,
        config: Config,
        levels: list[Level],
        model: Hope,
        mc: TransformerConfig,
        layout: Layout,
    ) -> None:
        self.config, self.levels, self.layout = config, levels, layout
        self.groups = [
            _group_optimizer(group, parameters, config, mc, layout)
            for group, parameters in split_by_group(config, levels, model).items()
        ]

    @property
    def windows(self) -> list[Window]:
        return [g.window for g in self.groups]

    def start_step(self) -> None:
        """Before the first backward pass of a step."""
        for window in self.windows:
            window.start_step()

    def finish_backward(self) -> Tensor:
        """Sum the step's gradient inside the node; whether it is finite here, a bool tensor."""
        for window in self.windows:
            window.finish_step()
        return torch.isfinite(torch.stack([w.square() for w in self.windows])).all()

    def admit(self, tokens: int) -> None:
        """Add the step's gradient, of that many tokens over all ranks, to every window."""
        if self.config.levels.reduction == Reduction.every_step:
            reduce_across_nodes(self.layout, [s for w in self.windows for s in w.shards])
        for window in self.windows:
            window.admit(tokens)

    def update(self, step: int) -> dict[int, dict[str, float | None]]:
        """Step the groups that are due after this step, counted from 1; all of them at the end.

        Returns:
            For each level that updated: its learning rate, the norm of its window gradient before
            clipping, and the norm of its update over that of its weights (None at the steps at
            which that is not measured: for a level of period 1, all but every tenth).
        """
        last = step == self.config.train.steps
        due = [g for g in self.groups if (g.group.due(step) or last) and g.window.tokens]
        if self.config.levels.reduction == Reduction.deferred:
            reduce_across_nodes(self.layout, [s for g in due for s in g.window.sums])
        for g in due:
            g.window.close()
            g.reductions += 1
            with cpu.cuda_by_name():
                g.optimizer.prepare_grads()
        norms = self._norms(due)
        measured = [g for g in due if g.group.period > 1 or g.updates % _RATIO_EVERY == 0]
        before = [[p.detach().clone() for p in _main_parameters(g)] for g in measured]
        rate = learning_rate(self.config.optimizer, step, self.config.train.steps)
        rates: dict[int, float] = {}
        for g in due:
            warmup = update_warmup(self.config.optimizer, g.updates)
            rates[g.group.level] = rate * self.levels[g.group.level].learning_rate_scale * warmup
            g.window.scale(self._clip_factor(norms, g.group.level))
            for param_group in g.optimizer.optimizer.param_groups:
                param_group["lr"] = rates[g.group.level]
            with cpu.cuda_by_name():
                g.optimizer.step_with_ready_grads()
            g.updates += 1
        ratios = self._update_ratios(measured, before)
        return {
            level.index: {
                "learning_rate": rates[level.index],
                "grad_norm": norms[level.index],
                "update_ratio": ratios[level.index],
            }
            for level in self.levels
            if level.index in rates
        }

    def counts(self, level: int) -> tuple[int, int]:
        """Updates and reductions of a level: of that of its sync groups that made most."""
        mine = [g for g in self.groups if g.group.level == level]
        return max(g.updates for g in mine), max(g.reductions for g in mine)

    def traffic(self, step: int) -> tuple[float, float]:
        """Inter-node bytes that a node sends at this step, and that it does not have to send.

        Gradients only, as `nlscale plan` counts them; the second because groups are not due.
        """
        waiting = 0
        if self.config.levels.reduction == Reduction.deferred:
            waiting = sum(g.parameters for g in self.groups if not g.group.due(step))
        crossing = sum(g.parameters for g in self.groups) - waiting
        scale, nodes = self.layout.model_ranks_per_node, self.layout.nodes
        return reduction_bytes(scale * crossing, nodes), reduction_bytes(scale * waiting, nodes)

    def window_fill(self, level: int, tokens_per_step: int) -> float:
        """Share of its period that the fullest window of a level holds now, 0 to 1."""
        mine = [w for w in self.windows if w.group.level == level]
        return max(w.tokens / (w.group.period * tokens_per_step) for w in mine)

    def replica_difference(self, model: Hope) -> str | None:
        """The first parameter, or optimizer state, that replicas do not share bit for bit."""
        named = {name: p.detach() for name, p in model.named_parameters()}
        different = first_difference(self.layout, named, data_parallel_group())
        if different is None and self.layout.across_nodes is not None:
            state = {
                f"{key} of the optimizer, level {g.group.level} phase {g.group.phase}, shard {i}": v
                for g in self.groups
                for i, p in enumerate(_main_parameters(g))
                for key, v in {"weights": p, **g.optimizer.optimizer.state[p]}.items()
                if v.dim() > 0  # the step count of a shard is a scalar, equal by construction
            }
            if state:
                different = first_difference(self.layout, state, self.layout.across_nodes)
        return different

    def _norms(self, due: list[GroupOptimizer]) -> list[float]:
        """Norm of the window gradient of what updates now, per level."""
        squares = torch.zeros(len(self.levels), dtype=torch.float64, device=self.layout.device)
        for g in due:
            squares[g.group.level] += g.window.square()
            if self.layout.tensor_rank > 0:
                # what every tensor-parallel rank holds counts once, on the first of them
                shared = [p.grad for p in _main_parameters(g) if not p.tensor_model_parallel]
                squares[g.group.level] -= sum(torch.dot(grad, grad) for grad in shared)
        dist.all_reduce(squares, group=self.layout.replica)
        return squares.sqrt().tolist()

    def _update_ratios(
        self, due: list[GroupOptimizer], before: list[list[Tensor]]
    ) -> list[float | None]:
        """|update| / |weights| of what has just updated, per level; None where nothing has.

        A reduction over the replica: every rank of it takes part, whether or not it holds a part
        of what has updated.
        """
        squares = torch.zeros(2, len(self.levels), dtype=torch.float64, device=self.layout.device)
        for g, old in zip(due, before, strict=True):
            squares[1, g.group.level] += self._square(old, g)
            torch._foreach_sub_(old, _main_parameters(g))
            squares[0, g.group.level] += self._square(old, g)
        dist.all_reduce(squares, group=self.layout.replica)
        moved, weights = squares.sqrt().tolist()
        return [m / w if w else None for m, w in zip(moved, weights, strict=True)]

    def _square(self, tensors: list[Tensor], g: GroupOptimizer) -> Tensor | float:
        """Sum of squares of one tensor a parameter shard, those on every tensor rank once."""
        counted = [
            tensor
            for tensor, p in zip(tensors, _main_parameters(g), strict=True)
            if p.tensor_model_parallel or self.layout.tensor_rank == 0
        ]
        return torch.stack(torch._foreach_norm(counted)).square().sum() if counted else 0.0

    def _clip_factor(self, norms: list[float], level: int) -> float:
        clip = self.config.optimizer.clip
        joint = self.config.optimizer.clip_scope == ClipScope.joint
        norm = sum(n * n for n in norms) ** 0.5 if joint else norms[level]
        return min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0


def _main_parameters(g: GroupOptimizer) -> list[Any]:
    """This rank's fp32 parameter shards of a group, as the inner optimizer holds them."""
    return [p for group in g.optimizer.optimizer.param_groups for p in group["params"]]


def split_by_group(
    config: Config, levels: list[Level], model: Hope
) -> dict[SyncGroup, dict[str, nn.Parameter]]:
    """The model's parameters by sync group, in the order of levels and phases."""
    split: dict[SyncGroup, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        level, depth = model.level_and_depth(name)
        group = sync_group(levels[level], depth, config.model.layers, config.levels.stagger)
        split.setdefault(group, {})[name] = parameter
    return dict(sorted(split.items()))


def _group_optimizer(
    group: SyncGroup,
    parameters: dict[str, nn.Parameter],
    config: Config,
    mc: TransformerConfig,
    layout: Layout,
) -> GroupOptimizer:
    window = Window(group, parameters, mc, layout, config.parallel.overlap)
    inner = _adamw(config.optimizer, parameters)
    with cpu.cuda_by_name():
        optimizer = DistributedOptimizer(
            inner,
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.optimizer.learning_rate,
                bf16=config.train.dtype == Dtype.bf16,
                params_dtype=mc.params_dtype,
                use_distributed_optimizer=True,
                clip_grad=0.0,
            ),
            None,  # no loss scale: bf16 and fp32 need none
            None,
            [window.ddp],
            {0: window.ddp.buffers},
            data_parallel_group=layout.within_node.dp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=0,
        )
    return GroupOptimizer(window, optimizer, sum(p.numel() for p in parameters.values()))


def _adamw(config: OptimizerConfig, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """Weight decay on matrices; vectors (norms, biases, mixing weights) have none."""
    groups = [
        {"params": chosen, "weight_decay": decay, "wd_mult": float(decay > 0), "lr_mult": 1.0}
        for chosen, decay in (
            ([p for p in parameters.values() if p.dim() > 1], config.weight_decay),
            ([p for p in parameters.values() if p.dim() <= 1], 0.0),
        )
        if chosen
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
