"""The optimizer rules written down plainly: whole matrices, one process, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from levels.level_runs import _adam, load, run_oracle

from nlscale.config.vocabulary import Config, OptimizerConfig

MATRICES = ("project.weight", "output.weight", "up.weight", "down.weight", "memory_key",
            "memory_value", "memory_read")  # fmt: skip


def run_plain(overrides: list[str], skip: frozenset[int] = frozenset()) -> dict[str, Any]:
    """`run_oracle`, each parameter under the rule that its level and kind ask for."""
    config = load(overrides)
    return run_oracle(overrides, skip, partial(plain_rule, config))


def plain_rule(config: Config, name: str, p: torch.nn.Parameter, level: int, depth: int) -> Any:
    """The optimizer of a parameter."""
    rule = _rule_of(config, level)
    if rule == "sgd":
        return PlainSgd(config, name, p)
    if rule == "adamw" or not name.endswith(MATRICES):
        return _adam(config, name, p)
    return PlainMatrices(rule, config.optimizer, config.model.layers, p, depth)


def _rule_of(config: Config, level: int) -> str:
    own = config.levels.spectrum[level].optimizer
    return str(own.get("rule", config.optimizer.rule))


def matrices_of(p: Any) -> Iterator[torch.Tensor]:
    """Views of the matrices of a whole parameter: its sections, or its heads."""
    if p.dim() == 3:
        yield from p.detach()
    else:
        yield from p.detach().split(p.sections or (p.shape[0],))


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Five steps with Jordan's coefficients, in the dtype of x."""
    y = x / max(1e-7, x.norm().item())
    if x.shape[0] > x.shape[1]:
        y = y.T
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    return y.T if x.shape[0] > x.shape[1] else y


class Plain:
    """What the oracle asks of an optimizer of one parameter."""

    def __init__(self, p: torch.nn.Parameter) -> None:
        self.p = p
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0}]
        self.state: dict[torch.nn.Parameter, dict[str, Any]] = {}

    def step(self) -> None:
        made = self.state.setdefault(self.p, {"step": 0})
        made["step"] += 1
        with torch.no_grad():
            self.update(self.param_groups[0]["lr"], made["step"])

    def update(self, rate: float, made: int) -> None:
        raise NotImplementedError


class PlainSgd(Plain):
    def __init__(self, config: Config, name: str, p: torch.nn.Parameter) -> None:
        super().__init__(p)
        self.b = config.optimizer.sgd.momentum
        (group,) = _adam(config, name, p).param_groups
        self.decay, self.momentum = group["weight_decay"], torch.zeros_like(p)

    def update(self, rate: float, made: int) -> None:
        assert self.p.grad is not None
        self.momentum = self.b * self.momentum + self.p.grad
        self.p -= rate * (self.momentum + self.decay * self.p)


class PlainMatrices(Plain):
    """muon by torch.optim.Muon, with products in fp32; m3 and delta by their equations."""

    def __init__(
        self, rule: str, config: OptimizerConfig, layers: int, p: torch.nn.Parameter, depth: int
    ) -> None:
        super().__init__(p)
        self.rule, self.config, self.layers, self.depth = rule, config, layers, depth
        # which share their memory with p
        self.parts = [torch.nn.Parameter(view) for view in matrices_of(p)]
        zeros = lambda: [torch.zeros_like(part) for part in self.parts]  # noqa: E731
        self.fast, self.slow, self.second, self.turned = zeros(), zeros(), zeros(), zeros()
        self.muon = torch.optim.Muon(
            self.parts,
            weight_decay=config.weight_decay,
            momentum=config.muon.momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    def update(self, rate: float, made: int) -> None:
        whole: Any = self.p.grad
        whole.sections = self.p.sections  # type: ignore[attr-defined]
        gradients = list(matrices_of(whole))
        if self.rule == "muon":
            self.muon.param_groups[0]["lr"] = rate
            for part, gradient in zip(self.parts, gradients, strict=True):
                part.grad = gradient
            plain = mock.patch("torch.optim._muon._zeropower_via_newtonschulz", _for_torch)
            with plain:
                self.muon.step()
            return
        for i, (part, gradient) in enumerate(zip(self.parts, gradients, strict=True)):
            direction = {"m3": self.m3, "delta": self.delta, "deep": self.deep}[self.rule](
                i, gradient, made
            )
            part.mul_(1 - rate * self.config.weight_decay).sub_(rate * direction)

    def delta(self, i: int, g: torch.Tensor, made: int) -> torch.Tensor:
        b, eta = self.config.delta.momentum, self.config.delta.eta
        h = g / g.norm()
        self.fast[i] = b * self.fast[i] + (1 - b) * g - eta * self.fast[i] @ h.T @ h
        mixed = (1 - b) * g + b * self.fast[i]
        return newton_schulz(mixed) * 0.2 * math.sqrt(max(g.shape))

    def deep(self, i: int, g: torch.Tensor, made: int) -> torch.Tensor:
        own, (out, into) = self.config.deep, g.shape
        rank = min(into // own.inputs_per_rank, out // 2)
        if made == 1:
            place = torch.arange(into) + 0.5
            waves = [torch.cos(math.pi / into * f * place) for f in range(1, rank + 1)]
            self.slow[i] = (
                math.sqrt(2 / into) * torch.stack(waves) if rank else torch.zeros(0, into)
            )
            self.second[i] = torch.zeros(into, rank)

        def m(u: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return u + torch.nn.functional.silu(u @ a.T) @ b.T

        def rms(rows: torch.Tensor) -> torch.Tensor:
            return rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-15)

        with torch.enable_grad():
            a, b = self.slow[i].requires_grad_(), self.second[i].requires_grad_()
            errors = m(self.fast[i] / rms(self.fast[i]), a, b) - g / rms(g)
            of_a, of_b = torch.autograd.grad(errors.square().sum(1).mean() / 2, (a, b))
        step = own.rate * math.sqrt(rank)
        self.slow[i] = a.detach() - step * of_a / of_a.norm().clamp(min=1e-30)
        self.second[i] = own.decay * b.detach() - step * of_b / of_b.norm().clamp(min=1e-30)
        self.fast[i] = own.momentum * self.fast[i] + (1 - own.momentum) * g
        mixed = (1 - own.momentum) * g + own.momentum * self.fast[i]
        through = rms(mixed) * m(mixed / rms(mixed), self.slow[i], self.second[i])
        return newton_schulz(through) * 0.2 * math.sqrt(max(g.shape))

    def m3(self, i: int, g: torch.Tensor, made: int) -> torch.Tensor:
        own = self.config.m3
        self.fast[i] = own.momentum * self.fast[i] + (1 - own.momentum) * g
        self.second[i] = own.second_moment * self.second[i] + (1 - own.second_moment) * g * g
        at = (made - 1 + self.depth * own.every // self.layers) % own.every
        if at == 0:
            self.slow[i] = own.slow_momentum * self.slow[i]
        self.slow[i] += (1 - own.slow_momentum) * g / own.every
        if at == own.every - 1:
            self.turned[i] = newton_schulz(self.slow[i])
        mixed = (1 - own.momentum) * g + own.momentum * self.fast[i]
        root = (self.second[i] / (1 - own.second_moment**made)).sqrt() + self.config.eps
        raised = (newton_schulz(mixed) + own.slow_weight * self.turned[i]) / root
        return 0.2 * raised / raised.square().mean().sqrt()


def _for_torch(grad: torch.Tensor, *_: Any) -> torch.Tensor:
    return newton_schulz(grad)
