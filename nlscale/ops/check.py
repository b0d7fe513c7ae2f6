"""Whether the kernels compute the right thing on this device.

Compilers for GPUs have miscompiled kernels of this kind, silently (flash-linear-attention #640 and
#984, Triton 3.4 to 3.7 on Hopper). So a run on GPUs compares those it is about to use with float64
before its first step (`nlscale.model.kernels`), and `nlscale bench scan --check` all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlscale.errors import TrainingFailed
from nlscale.ops.accumulate import accumulate_product_
from nlscale.ops.attention import causal_attention, takes_packed
from nlscale.ops.documents import Documents
from nlscale.ops.loss import cross_entropy
from nlscale.ops.memory.kernels import sizes as fused_scan
from nlscale.ops.memory.reference import memory_reference
from nlscale.ops.memory.rules import MemoryRules, MemoryWeights
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.pointwise import normalize

BOUNDS = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Norm of the error by norm of the value; bf16 products leave 0.3e-2 to 3e-2."""
_ROWS = 64
# A number or two may happen to vanish: compared by the norm of all that are named.
_TOGETHER = {
    "eta": ("eta", "alpha"),
    "alpha": ("eta", "alpha"),
    "lambda_key": ("lambda_key", "key"),
    "lambda_value": ("lambda_value", "value"),
}


class ScanInputs:
    """What a memory scans: random, with learned memories as at the start of a run.

    Args:
        rules: what kind of memory it is.
        shape: of what is scanned, [batch, heads, time, d].
        makes: whether memories make k, v and the gates.
        lambda_init: weight of the self-modified part of k and v, where there is a static one.
        biases: of the logits of write strength and decay.
        dtype: of what feeds it.
        device: where it runs.
    """

    def __init__(
        self,
        rules: MemoryRules,
        shape: tuple[int, int, int, int],
        makes: bool,
        lambda_init: float,
        biases: tuple[float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.rules = rules
        batch, heads, length, d = shape

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*sizes, device=device)

        leaves = {
            "a": normal(*shape).to(dtype),
            "b": normal(*shape).to(dtype),
            "q": normalize(normal(*shape)).to(dtype),
            "eta": normal(batch, heads, length) + biases[0],
            "alpha": normal(batch, heads, length) + biases[1],
        }
        if makes:
            for name in ("key", "value") + (() if rules.main_memory else ("read",)):
                leaves[name] = torch.linalg.qr(normal(heads, d, d))[0]
            leaves["gates"] = normal(heads, 2, d, scale=0.02)
        if makes and rules.main_memory:
            for name in ("lambda_key", "lambda_value"):
                leaves[name] = torch.full((heads,), lambda_init, device=device)
        self.leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def to(self, dtype: torch.dtype, device: torch.device | str) -> ScanInputs:
        """A copy, all of it in that precision and place."""
        other = object.__new__(ScanInputs)
        other.rules = self.rules
        other.leaves = {
            name: leaf.detach().to(device, dtype).requires_grad_()
            for name, leaf in self.leaves.items()
        }
        return other

    def arguments(self) -> tuple[Any, ...]:
        """Of `memory_scan` and of the reference."""
        names = ("key", "value", "gates", "lambda_key", "lambda_value", "read")
        weights = None
        if "key" in self.leaves:
            weights = MemoryWeights(*(self.leaves.get(name) for name in names))  # type: ignore[arg-type]
        fed = (self.leaves[name] for name in ("a", "b", "q", "eta", "alpha"))
        return *fed, weights, self.rules

    @property
    def path(self) -> str:
        """What `memory_scan` runs it through."""
        a, b, q = (self.leaves[name] for name in "abq")
        fused = fused_scan.supports(a, b, q, self.rules, "key" not in self.leaves)
        return "kernels" if fused else "torch"

    def make_keys_alike(self) -> None:
        """In half of the heads, which is where an inverse that is not stable shows."""
        with torch.no_grad():
            alike = self.leaves["a"][:, ::2]
            alike.copy_(alike[:, :, :1] + 0.1 * alike)


def scan_results(
    inputs: ScanInputs, weight: Tensor, carried: Tensor | None = None, reference: bool = False
) -> dict[str, Tensor]:
    """The reads, and the derivatives of their sum with these weights by everything, by name.

    `carried` is an argument of the scan; the reference has none.
    """
    a, b, q, eta, alpha, weights, rules = inputs.arguments()
    if reference:
        read = memory_reference(a, b, q, eta, alpha, weights, rules)
    else:
        read, _ = memory_scan(a, b, q, eta, alpha, weights, rules, None, carried)
    weight = weight.to(read.device, read.dtype)
    gradients = torch.autograd.grad(read, [*inputs.leaves.values()], weight)
    return {"reads": read.detach(), **dict(zip(inputs.leaves, gradients, strict=True))}


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error by norm of the value; infinite where a value is not finite."""
    norms = {name: value.double().norm().item() for name, value in want.items()}
    errors = {}
    for name, value in want.items():
        scale = sum(norms[part] for part in _TOGETHER.get(name, (name,)) if part in norms)
        error = (got[name].to(value.device).double() - value.double()).norm().item() / scale
        errors[name] = error if error == error else float("inf")
    return errors


def refuse_beyond(
    bound: float, errors: dict[str, float], library: str, device: torch.device
) -> None:
    """Refuse to train where a kernel is off by more than rounding.

    Raises:
        TrainingFailed: what is off, by how much, and whose kernel it is.
    """
    what, error = max(errors.items(), key=lambda item: item[1], default=("", 0.0))
    if error > bound:
        raise TrainingFailed(
            f"the kernels compute something else than they should on {device}: {what} is off by "
            f"{error:.1e}, and at most {bound:g} would be rounding. Install another version of "
            f"{library} (nlscale bench scan --check tells of each kernel), or set "
            f"train.kernels=false, which is much slower"
        )


def loss_errors(columns: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of the kernels of the cross entropy; none where they do not take these logits."""
    logits = torch.randn(_ROWS, columns, device=device).to(dtype)
    if not cross_entropy.supports(logits):
        return {}
    targets = torch.randint(columns, (_ROWS,), device=device)
    exact, results = logits.double(), []
    for x, kernels in ((logits, True), (exact, False)):
        largest, total, at_target = cross_entropy.row_statistics(x, targets, kernels)
        log_sum = largest + total.log()
        cross_entropy.to_gradient_(x, targets, log_sum, torch.ones_like(log_sum), kernels)
        results.append({"loss": log_sum - at_target, "derivative by the logits": x})
    return relative_errors(*results)


def attention_errors(d: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of attention within documents; none where it does not run as sequences of several lengths."""
    batch, heads, time = 2, 2, 200
    tokens = np.ones((batch, time), dtype=np.int64)
    tokens[0, [1, 70]] = tokens[1, 150] = 0
    leaves = {name: torch.randn(batch, heads, time, d, device=device).to(dtype) for name in "qkv"}
    if not takes_packed(leaves["q"]):
        return {}
    weight, results = torch.randn(batch, heads, time, d), []
    for place, precision in ((device, dtype), (torch.device("cpu"), torch.float64)):
        documents = Documents.of(tokens, 0, _ROWS, place)
        given = q, k, v = [x.to(place, precision).requires_grad_() for x in leaves.values()]
        read = causal_attention(q, k, v, documents)
        gradients = torch.autograd.grad(read, given, weight.to(place, precision))
        of = (f"{name} of attention within documents" for name in ("reads", *leaves))
        results.append(dict(zip(of, (read.detach(), *gradients), strict=True)))
    return relative_errors(*results)


def accumulation_errors(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of two gradients of a weight, added up in fp32 whatever the dtype of their factors."""
    outputs, inputs = 96, 160
    factors = [
        (torch.randn(_ROWS, outputs, device=device), torch.randn(_ROWS, inputs, device=device))
        for _ in range(2)
    ]
    total = torch.zeros(outputs, inputs, device=device)
    exact = torch.zeros(outputs, inputs, device=device, dtype=torch.float64)
    for d_output, x in factors:
        accumulate_product_(total, d_output.to(dtype), x.to(dtype))
        exact += d_output.to(dtype).double().t() @ x.to(dtype).double()
    name = "the sum of a weight's gradients"
    return relative_errors({name: total}, {name: exact})
