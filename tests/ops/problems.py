"""Random problems for the memory, in each of its modes, and how their answers are compared."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from nlscale.ops.memory.reference import memory_reference
from nlscale.ops.memory.rules import MainWeights, MemoryRules, MemoryState, MemoryWeights
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.pointwise import normalize

MODES = {
    "hope": MemoryRules(4, anchored=True, c=0.0, normalize_value=True, main_memory=True),
    "pure": MemoryRules(4, anchored=True, c=1.0, normalize_value=True, main_memory=False),
    "paper": MemoryRules(4, anchored=False, c=1.0, normalize_value=False, main_memory=False),
    "gated-delta": MemoryRules(4, anchored=False, c=0.0, normalize_value=False, main_memory=True),
}
CASES = ("correlated keys", "strong decay", "no decay", "large eta", "shared input")


class Problem:
    """Random inputs and weights of one mode; `leaves` are all that has a gradient, by name."""

    def __init__(
        self,
        mode: str,
        length: int,
        case: str = "",
        d: int = 5,
        heads: int = 2,
        batch: int = 2,
        dtype: torch.dtype = torch.float64,
        chunk: int = 4,
        **rules: bool | float,
    ) -> None:
        self.rules = replace(MODES[mode], chunk=chunk, **rules)
        shape = (batch, heads, length)
        a, b, q = (torch.randn(*shape, d, dtype=torch.float64) for _ in range(3))
        if case == "correlated keys":
            a = torch.randn(d, dtype=torch.float64) + 1e-3 * a
        channels = self.rules.channel_gates
        eta = torch.randn(*shape, *(2 * d,) * channels, dtype=torch.float64)
        alpha = torch.randn(*shape, *(d,) * channels, dtype=torch.float64)
        if mode == "paper":  # it magnifies rounding without end where writes are strong
            eta = eta - 2
        eta = eta + (12 if case == "large eta" else 0)
        alpha = alpha + {"strong decay": -20, "no decay": 20}.get(case, 3)
        leaves = {"a": a, "b": b, "q": normalize(q), "eta": eta, "alpha": alpha}
        gates = 3 * d if channels else 2  # rows
        if case == "shared input":
            del leaves["b"]
        if mode != "gated-delta":
            for name in ("key", "value") + (() if self.rules.main_memory else ("read",)):
                leaves[name] = torch.linalg.qr(torch.randn(heads, d, d, dtype=torch.float64))[0]
            leaves["gates"] = 0.3 * torch.randn(heads, gates, d, dtype=torch.float64)
            if mode == "hope":
                for name in ("lambda_key", "lambda_value"):
                    leaves[name] = 0.3 + 0.3 * torch.randn(heads, dtype=torch.float64)
        if self.rules.reads_state:
            for name in ("state_key", "state_value"):
                leaves[name] = torch.linalg.qr(torch.randn(heads, d, d, dtype=torch.float64))[0]
            leaves["state_gates"] = torch.randn(heads, gates, d, dtype=torch.float64)
            leaves["state_weight"] = 0.5 * torch.randn(heads, 3, dtype=torch.float64)
        if self.rules.kalman_gain:
            leaves["noise"] = torch.randn(heads, dtype=torch.float64) - 1
        if self.rules.chunk_momentum:
            leaves["momentum_decay"] = torch.randn(heads, dtype=torch.float64)
            leaves["momentum_weight"] = 0.5 * torch.randn(heads, dtype=torch.float64)
        self.leaves = {k: v.to(dtype).requires_grad_() for k, v in leaves.items()}

    def cast(self, dtype: torch.dtype) -> Problem:
        other = object.__new__(Problem)
        other.rules = self.rules
        other.leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in self.leaves.items()}
        return other

    def nearby(self) -> Problem:
        """Every number changed by as much as rounding it to fp32 may change it, at random."""
        other = object.__new__(Problem)
        other.rules = self.rules
        for_fp32 = torch.finfo(torch.float32).eps / 2
        other.leaves = {
            name: (x.detach() * (1 + for_fp32 * (2 * torch.rand_like(x) - 1))).requires_grad_()
            for name, x in self.leaves.items()
        }
        return other

    def inputs(self) -> list[Tensor]:
        return [self.leaves.get(k, self.leaves["a"]) for k in ("a", "b", "q", "eta", "alpha")]

    def weights(self) -> MemoryWeights | None:
        if "key" not in self.leaves:
            return None
        return MemoryWeights(**{f.name: self.leaves.get(f.name) for f in fields(MemoryWeights)})

    def main(self) -> MainWeights:
        return MainWeights(**{f.name: self.leaves.get(f.name) for f in fields(MainWeights)})

    def scan(self, state: MemoryState | None = None) -> tuple[Tensor, MemoryState]:
        return memory_scan(*self.inputs(), self.weights(), self.rules, state, main=self.main())

    def reference(self) -> Tensor:
        return memory_reference(*self.inputs(), self.weights(), self.rules, self.main())

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        return dict(
            zip(self.leaves, torch.autograd.grad(loss, [*self.leaves.values()]), strict=True)
        )


# A number or two may happen to vanish: these are compared by the norm of all that are named.
_TOGETHER = {
    "momentum_decay": ("momentum_decay", "momentum_weight"),
    "eta": ("eta", "alpha"),
    "alpha": ("eta", "alpha"),
    "lambda_key": ("lambda_key", "key"),
    "lambda_value": ("lambda_value", "value"),
}


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error by norm of the value."""
    norms = {name: value.norm().item() for name, value in want.items()}
    return {
        name: (got[name].double() - value).norm().item()
        / sum(norms[part] for part in _TOGETHER.get(name, (name,)) if part in norms)
        for name, value in want.items()
    }


def conditions(problem: Problem, want: dict[str, Tensor], weight: Tensor) -> dict[str, float]:
    """How much a relative change of what is given is magnified in the reads and each gradient.

    Measured by the reference in float64, on problems nearby. No algorithm is more accurate than
    its precision times this: where a key is the direction of next to nothing (`paper`, whose
    memories decay to nothing), its gradient may be known to three digits in fp32, whoever computes
    it.
    """
    rounding = torch.finfo(torch.float32).eps / 2
    found = dict.fromkeys(want, 0.0)
    for _ in range(2):
        other = problem.nearby()
        read = other.reference()
        moved = {"read": read, **other.gradients((read * weight).sum())}
        for name, error in relative_errors(moved, want).items():
            found[name] = max(found[name], error / rounding)
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    for name, error in relative_errors(got, want).items():
        assert error <= bound, f"{name}: relative error {error:.1e}"
