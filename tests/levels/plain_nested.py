"""The nested form of CMS written down plainly: one process, float64, dictionaries of tensors.

Nothing of the engine is used, nor its schedule: at which steps a block updates, and its copies
move, is listed here step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from levels.level_runs import VOCABULARY, load, sequences

from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.optim.schedule import learning_rate
from nlscale.parallel.layout import process_groups


def run_plain(overrides: list[str], skip: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Train as configured, where the first level has all of the model and the others copies.

    Args:
        overrides: of `level_runs.TINY`.
        skip: steps that are dropped.

    Returns:
        losses; the parameters at the end; `moved`, how often copies of each level have moved, of
        the first block.
    """
    config = load(overrides)
    spectrum, layers, last = config.levels.spectrum, config.model.layers, config.train.steps
    periods = [int(str(own.period).split()[0]) for own in spectrum]
    own = periods[0]
    updates = [
        [i for i in range(1, last + 1) if i % own == depth * own // layers % own]
        for depth in range(layers)
    ]
    ratios = [period // own for period in periods]
    with process_groups(config):
        model = Decoder(config, megatron_config(config), VOCABULARY)
        initialize(model, config.run.seed, 0, 1)
        named = dict(model.named_parameters())
        theta = {name: p.detach().double() for name, p in named.items()}
        copies = {
            name: [w.clone() for _ in spectrum[1:]] for name, w in theta.items() if "mlps" in name
        }
        depth_of = {name: model.level_and_depth(name)[1] for name in named}
        adam = {name: _Adam(config, name, w) for name, w in theta.items()}
        sums = {name: torch.zeros_like(w) for name, w in theta.items()}
        tokens, moved, losses = [0] * layers, [0] * len(spectrum), []
        for step in range(1, last + 1):
            batch = sequences(config, step)
            model.zero_grad()
            loss: Any = sum(model(b.tokens, b.targets, b.documents).sum() for b in batch)
            loss.backward()
            count = sum(b.counted_tokens for b in batch)
            losses.append(loss.item() / count)
            if step not in skip:
                tokens = [n + count for n in tokens]
                for name, p in named.items():
                    sums[name] += p.grad.double()
            rate = learning_rate(config.optimizer, step, last)
            for depth in range(layers):
                mine = [name for name in named if depth_of[name] == depth]
                if tokens[depth] and (step in updates[depth] or step == last):
                    for name in mine:
                        adam[name].step(theta[name], sums[name] / tokens[depth], rate)
                        sums[name].zero_()
                    tokens[depth] = 0
                for level in range(1, len(spectrum)):
                    if step in updates[depth][ratios[level] - 1 :: ratios[level]]:
                        moved[level] += depth == 0
                        for name in set(mine) & copies.keys():
                            _move(theta[name], copies[name], level, spectrum[level].copy_rate)
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(theta[name])
        return {
            "losses": losses,
            "parameters": {n: p.detach().clone() for n, p in named.items()},
            "moved": moved[1:],
        }


def _move(theta: torch.Tensor, copies: list[torch.Tensor], level: int, rate: float) -> None:
    """phi_l <- phi_l + eta (phi_{l-1} - phi_l), and every faster one is set to it."""
    chain = [theta, *copies]
    chain[level] += rate * (chain[level - 1] - chain[level])
    for faster in chain[:level]:
        faster.copy_(chain[level])


class _Adam:
    """AdamW with decoupled decay, in float64."""

    def __init__(self, config: Any, name: str, like: torch.Tensor) -> None:
        self.o = config.optimizer
        self.decay = self.o.weight_decay if like.dim() > 1 and "norm" not in name else 0.0
        self.m, self.v, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        self.t += 1
        self.m = self.o.beta1 * self.m + (1 - self.o.beta1) * gradient
        self.v = self.o.beta2 * self.v + (1 - self.o.beta2) * gradient**2
        m, v = self.m / (1 - self.o.beta1**self.t), self.v / (1 - self.o.beta2**self.t)
        weights *= 1 - rate * self.decay
        weights -= rate * m / (v.sqrt() + self.o.eps)
