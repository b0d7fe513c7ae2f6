"""Outer steps and local levels written down plainly: one process that plays all nodes.

A model a node, dictionaries of tensors, torch's AdamW; nothing of the engine is used, nor its
schedule: at which steps a block updates, and makes its outer steps, is listed here step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from levels.level_runs import VOCABULARY, load, sequences
from levels.plain_rules import plain_rule

from nlscale.config.vocabulary import Config
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.optim.schedule import learning_rate
from nlscale.parallel.layout import process_groups


def run_plain(
    overrides: list[str],
    nodes: int,
    ranks_of_a_node: int = 1,
    skip: frozenset[int] = frozenset(),
    updates: dict[int, list[int]] | None = None,
) -> dict[str, Any]:
    """Train as configured.

    Args:
        overrides: of `level_runs.TINY`.
        nodes: that are played.
        ranks_of_a_node: data-parallel ranks, which share out the sequences of a step.
        skip: steps that are dropped.
        updates: of levels whose period changes, the steps at which they update, all blocks at once.

    Returns:
        losses; `parameters`: of each node at the end.
    """
    config = load(overrides)
    with process_groups(config):
        models = [_Node(config) for _ in range(nodes)]
        kinds = {name: _Kind(config, *models[0].place(name), updates) for name in models[0].named}
        shared = _Counts(list(kinds.values()))
        losses = []
        for step in range(1, config.train.steps + 1):
            all_of_them, ranks = sequences(config, step), nodes * ranks_of_a_node
            total = count = 0
            for k, node in enumerate(models):
                mine = [b for i, b in enumerate(all_of_them) if i % ranks // ranks_of_a_node == k]
                loss, tokens = node.backward(mine)
                total, count = total + loss, count + tokens
                if step not in skip:
                    node.counts.add(tokens)
                    node.take_gradients()
            losses.append(total / count)
            if step not in skip:
                shared.add(count)
            due = [n for n, k in kinds.items() if step in k.updates or step == config.train.steps]
            due = [name for name in due if shared.window[kinds[name]]]
            _update(config, models, kinds, shared, due, step)
            for node in models:
                node.counts.close({kinds[name] for name in due})
            shared.close({kinds[name] for name in due})
            ends = [n for n, k in kinds.items() if step in k.outer_steps
                    or (k.local and step == config.train.steps)]  # fmt: skip
            ends = [name for name in ends if shared.period[kinds[name]]]
            for name in ends:
                _outer_step(models, kinds[name], name, whole=step in kinds[name].outer_steps)
            for counts in [shared, *(node.counts for node in models)]:
                for kind in {kinds[name] for name in ends}:
                    counts.period[kind] = 0
        return {
            "losses": losses,
            "parameters": [
                {n: p.detach().clone() for n, p in node.named.items()} for node in models
            ],
        }


class _Kind:
    """What a parameter's level and depth make of it."""

    def __init__(
        self,
        config: Config,
        level: int,
        depth: int,
        updates: dict[int, list[int]] | None = None,
    ) -> None:
        own, layers, steps = config.levels.spectrum[level], config.model.layers, config.train.steps
        self.level, self.local = level, own.local
        self.outer = own.outer if own.outer.every else None
        period = int(str(own.period).split()[0])
        longest = period * (own.outer.every if own.local else 1)
        at = depth * longest // layers if config.levels.stagger else 0
        self.updates = [i for i in range(1, steps + 1) if i % period == at % period]
        self.outer_steps: list[int] = []
        changing = updates is not None and level in updates
        if updates is not None and level in updates:
            self.updates = updates[level]
        if self.local and not changing:
            self.outer_steps = [i for i in range(1, steps + 1) if i % longest == at]
        elif self.outer is not None:
            self.outer_steps = self.updates[own.outer.every - 1 :: own.outer.every]
        self._key = (level, at)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kind) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Counts:
    """Targets in the windows of each kind of parameter, and since its last outer step."""

    def __init__(self, kinds: list[_Kind]) -> None:
        self.window, self.period = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)

    def add(self, tokens: int) -> None:
        for kind in self.window:
            self.window[kind] += tokens

    def close(self, kinds: set[_Kind]) -> None:
        for kind in kinds:
            self.period[kind] += self.window[kind]
            self.window[kind] = 0


class _Node:
    """A model, and what a node keeps of its parameters."""

    def __init__(self, config: Config) -> None:
        self.model = Decoder(config, megatron_config(config), VOCABULARY)
        initialize(self.model, config.run.seed, 0, 1)
        self.named = dict(self.model.named_parameters())
        self.rule: dict[str, Any] = {
            name: plain_rule(config, name, p, *self.place(name)) for name, p in self.named.items()
        }
        self.sums = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.before = {name: p.detach().clone() for name, p in self.named.items()}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.counts = _Counts([_Kind(config, *self.place(name)) for name in self.named])

    def place(self, name: str) -> tuple[int, int]:
        return self.model.level_and_depth(name)

    def backward(self, batches: list[Any]) -> tuple[float, int]:
        self.model.zero_grad()
        loss: Any = sum(self.model(b.tokens, b.targets, b.documents).sum() for b in batches)
        loss.backward()
        return loss.item(), sum(b.counted_tokens for b in batches)

    def take_gradients(self) -> None:
        for name, p in self.named.items():
            self.sums[name] += p.grad


def _update(
    config: Config,
    models: list[_Node],
    kinds: dict[str, _Kind],
    shared: _Counts,
    due: list[str],
    step: int,
) -> None:
    for node in models:
        means = {}
        for name in due:
            kind = kinds[name]
            if kind.local:
                means[name] = node.sums[name] / node.counts.window[kind]
            else:
                means[name] = sum(other.sums[name] for other in models) / shared.window[kind]
        for name, mean in means.items():
            kind = kinds[name]
            together = [m for other, m in means.items() if kinds[other].level == kind.level]
            if config.optimizer.clip_scope.value == "joint":
                together = [m for other, m in means.items() if kinds[other].local == kind.local]
            norm = torch.stack([m.norm() for m in together]).norm().item()
            clip = config.optimizer.clip
            node.named[name].grad = mean * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
            rate = learning_rate(config.optimizer, step, config.train.steps)
            node.rule[name].param_groups[0]["lr"] = rate
    for node in models:
        for name in due:
            node.rule[name].step()
            node.sums[name].zero_()


@torch.no_grad()
def _outer_step(models: list[_Node], kind: _Kind, name: str, whole: bool) -> None:
    """Not `whole`: with the run ends a part of an outer period, and nodes have but to meet."""
    tokens = [node.counts.period[kind] if kind.local else 1 for node in models]
    moved: Any = sum(
        count * (node.before[name] - node.named[name])
        for count, node in zip(tokens, models, strict=True)
    )
    moved /= sum(tokens)
    rate, momentum = kind.outer.learning_rate, kind.outer.momentum
    for node in models:
        if whole:
            node.momentum[name] = momentum * node.momentum[name] + moved
            after = node.before[name] - rate * (moved + momentum * node.momentum[name])
        else:
            after = node.before[name] - moved
        node.before[name] = after
        node.named[name].copy_(after)
