"""Whether the kernels compute the right thing on this device.

Compilers for GPUs have miscompiled kernels of this kind, silently (flash-linear-attention #640 and
#984, Triton 3.4 to 3.7 on Hopper). So a run on GPUs compares those it is about to use with float64
before its first step (`nlscale.model.kernels`), and `nlscale bench scan --check` all of them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nlscale.errors import TrainingFailed
from nlscale.ops.accumulate import accumulate_product_
from nlscale.ops.attention import causal_attention, takes_packed
from nlscale.ops.compiler import SOUND, compiler_for
from nlscale.ops.documents import Documents
from nlscale.ops.loss import cross_entropy
from nlscale.ops.memory.kernels import sizes as fused_scan
from nlscale.ops.memory.reference import memory_reference
from nlscale.ops.memory.rules import MainWeights, MemoryRules, MemoryWeights
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.pointwise import normalize
from nlscale.ops.quantize import blocks
from nlscale.ops.quantize.rows import Rows

BOUNDS = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Norm of the error by norm of the value; bf16 products leave 0.3e-2 to 3e-2."""
_ROWS = 64
_FED = ("a", "b", "q", "eta", "alpha")
"""Leaves of a scan that are of a sequence; the others are of a head."""
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
            "eta": normal(batch, heads, length, *(2 * d,) * rules.channel_gates) + biases[0],
            "alpha": normal(batch, heads, length, *(d,) * rules.channel_gates) + biases[1],
        }
        gates = 3 * d if rules.channel_gates else 2
        if makes:
            for name in ("key", "value") + (() if rules.main_memory else ("read",)):
                leaves[name] = torch.linalg.qr(normal(heads, d, d))[0]
            leaves["gates"] = normal(heads, gates, d, scale=0.02)
        if makes and rules.main_memory:
            for name in ("lambda_key", "lambda_value"):
                leaves[name] = torch.full((heads,), lambda_init, device=device)
        if rules.reads_state:
            for name in ("state_key", "state_value"):
                leaves[name] = torch.linalg.qr(normal(heads, d, d))[0]
            leaves["state_gates"] = normal(heads, gates, d, scale=d**-0.5)
            leaves["state_weight"] = normal(heads, 3, scale=0.1)
        if rules.kalman_gain:
            leaves["noise"] = normal(heads) - biases[1]
        if rules.chunk_momentum:
            leaves["momentum_decay"] = normal(heads)
            leaves["momentum_weight"] = normal(heads, scale=0.1)
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

    def repeated(self, rows: int, heads: int) -> ScanInputs:
        """So many sequences and heads, the ones that are here over and over."""
        other = object.__new__(ScanInputs)
        other.rules = self.rules
        other.leaves = {
            name: _repeated(name, leaf.detach(), rows, heads).requires_grad_()
            for name, leaf in self.leaves.items()
        }
        return other

    def arguments(self) -> tuple[Any, ...]:
        """Of `memory_scan` and of the reference."""
        names = ("key", "value", "gates", "lambda_key", "lambda_value", "read")
        weights = None
        if "key" in self.leaves:
            weights = MemoryWeights(*(self.leaves.get(name) for name in names))  # type: ignore[arg-type]
        fed = (self.leaves[name] for name in _FED)
        return *fed, weights, self.rules

    def main(self) -> MainWeights:
        """What both are given as `main`."""
        return MainWeights(**{f.name: self.leaves.get(f.name) for f in fields(MainWeights)})

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
        read = memory_reference(a, b, q, eta, alpha, weights, rules, inputs.main())
    else:
        read, _ = memory_scan(
            a, b, q, eta, alpha, weights, rules, None, carried, True, None, inputs.main()
        )
    weight = weight.to(read.device, read.dtype)
    gradients = torch.autograd.grad(read, [*inputs.leaves.values()], weight)
    return {"reads": read.detach(), **dict(zip(inputs.leaves, gradients, strict=True))}


def errors_at_size(
    inputs: ScanInputs, rows: int, heads: int, carried: Tensor | None = None
) -> dict[str, float]:
    """Of a scan that has as many programs as it has in training.

    A few heads of one sequence fill it over and over, so that it is launched with the very sizes of
    training, by which Triton chooses what it compiles, while float64 has little to do: torch's
    chunk form, on the CPU. What is equal has to come out equal bit for bit.

    Args:
        inputs: of one sequence, and of a few heads.
        rows: sequences to make of it.
        heads: to make of its heads.
        carried: as of the scan, on the CPU, [1, chunks].

    Returns:
        Relative errors by name; infinite where one of the repetitions is not like the first.
    """
    weight, device = torch.randn_like(inputs.leaves["a"]), inputs.leaves["a"].device
    many = None if carried is None else carried.expand(rows, -1).contiguous().to(device)
    repeated = _repeated("reads", weight, rows, heads)
    got = scan_results(inputs.repeated(rows, heads), repeated, many)
    want = scan_results(inputs.to(torch.float64, "cpu"), weight, carried)
    return _errors_of_repetitions(got, want, rows, heads)


def _errors_of_repetitions(
    got: dict[str, Tensor], want: dict[str, Tensor], rows: int, heads: int
) -> dict[str, float]:
    few, first, apart = want["reads"].shape[1], {}, {}
    for name, x in got.items():
        of_sequence = _of_sequence(name)
        first[name] = x[:1, :few] if of_sequence else x[:few] / rows
        again = _repeated(name, x[:1, :few] if of_sequence else x[:few], rows, heads)
        if of_sequence and not torch.equal(x, again):
            apart[f"one of several equal {name}"] = float("inf")
        elif not of_sequence:  # the sum over sequences is torch's, and may round by its own order
            error = (x - again).norm().item() / again.norm().item()
            apart[f"another head's {name}"] = _or_infinite(error)
    return relative_errors(first, want) | apart


def _of_sequence(name: str) -> bool:
    return name == "reads" or name in _FED


def _repeated(name: str, x: Tensor, rows: int, heads: int) -> Tensor:
    """x [1, few, ...] -> [rows, heads, ...] of what a sequence has; [few, ...] -> [heads, ...]."""
    if not _of_sequence(name):
        return x[torch.arange(heads, device=x.device) % len(x)]
    head = torch.arange(heads, device=x.device) % x.shape[1]
    return x[:, head].expand(rows, *[-1] * (x.dim() - 1)).contiguous()


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error by norm of the value; infinite where a value is not finite."""
    norms = {name: value.double().norm().item() for name, value in want.items()}
    errors = {}
    for name, value in want.items():
        scale = sum(norms[part] for part in _TOGETHER.get(name, (name,)) if part in norms)
        error = (got[name].to(value.device).double() - value.double()).norm().item() / scale
        errors[name] = _or_infinite(error)
    return errors


def _or_infinite(error: float) -> float:
    """NaN compares with nothing: it is larger than every bound."""
    return error if error == error else float("inf")


def refuse_beyond(
    bound: float, errors: dict[str, float], library: str, device: torch.device
) -> None:
    """Refuse to train where a kernel is off by more than rounding.

    Raises:
        TrainingFailed: what is off, by how much, and whose kernel it is.
    """
    what, error = max(errors.items(), key=lambda item: item[1], default=("", 0.0))
    if error <= bound:
        return
    fixes = [
        f"install another version of {library} (nlscale bench scan --check tells of each kernel)",
        "set train.kernels=false, which is much slower",
    ]
    compiler = compiler_for(device) if library == "Triton" else None
    if compiler is not None and not compiler.sound:
        newer = ".".join(map(str, SOUND))
        fixes.insert(
            0,
            f"point {compiler.setting} at a ptxas of CUDA {newer} or later, such as the wheel of "
            f"Triton 3.9 brings (triton/backends/nvidia/bin/ptxas-blackwell)",
        )
    fix = ", or ".join(fixes)
    raise TrainingFailed(
        f"the kernels compute something else than they should on {device}: {what} is off by "
        f"{error:.1e}, and at most {bound:g} would be rounding. "
        + (f"They are compiled by {compiler}. " if compiler is not None else "")
        + f"{fix[0].upper()}{fix[1:]}"
    )


def loss_errors(
    columns: int, dtype: torch.dtype, device: torch.device, z_loss: float = 0.0
) -> dict[str, float]:
    """Of the kernels of the cross entropy; none where they do not take these logits."""
    logits = torch.randn(_ROWS, columns, device=device).to(dtype)
    if not cross_entropy.supports(logits):
        return {}
    targets = torch.randint(columns, (_ROWS,), device=device)
    exact, results = logits.double(), []
    for x, kernels in ((logits, True), (exact, False)):
        largest, total, at_target = cross_entropy.row_statistics(x, targets, kernels)
        log_sum = largest + total.log()
        ones = torch.ones_like(log_sum)
        cross_entropy.to_gradient_(x, targets, log_sum, ones, z_loss, kernels)
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


def packing_errors(bits: int, block: int, device: torch.device) -> dict[str, float]:
    """Of the kernels that pack gradients as integers; none where they do not take them.

    Args:
        bits: of an integer.
        block: values that share a scale.
        device: where they run.
    """
    values, error = torch.randn(2, 17 * block + 9)  # more than a program holds
    if not blocks.supports(values.to(device)):
        return {}
    results = []
    for place, kernels in ((device, True), (torch.device("cpu"), False)):
        rows = Rows.of([(1, len(values) - 1), (0, 1)], bits, block, place)
        x, owed = values.to(place), error.to(place)
        left, sums = torch.empty_like(x), torch.empty_like(x)
        packed = blocks.pack(x, owed, left, rows, kernels)
        blocks.unpack(torch.cat([packed, packed]), rows, sums, copies=2, kernels=kernels)
        names = f"sums of {bits}-bit integers", f"what {bits}-bit integers leave"
        results.append(dict(zip(names, (sums, left), strict=True)))
    return relative_errors(*results)
