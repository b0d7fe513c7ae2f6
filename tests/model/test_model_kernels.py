"""The check of the kernels before a run's first step, and what it finds."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from ops.interpreter import Call
from ops.test_ops_attention import within_bounds
from torch import Tensor
from torch.nn.attention import varlen

from nlscale.config import recipe
from nlscale.config.vocabulary import ModelConfig
from nlscale.errors import TrainingFailed
from nlscale.model.kernels import check_kernels
from nlscale.ops import attention, check
from nlscale.ops.loss import cross_entropy

CPU = torch.device("cpu")


def model(mixer: str) -> ModelConfig:
    sizes = ["model.d_model=64", "model.heads=4", "model.memory.chunk=16"]
    return recipe.load(None, ["data.dir=none", f"model.mixer={mixer}", *sizes]).config.model


def sound(mixer: str, dtype: torch.dtype) -> None:
    """In the process of the interpreter."""
    import nlscale.ops.memory.kernels.sizes

    calls = []

    def supports(*given: Any) -> bool:
        calls.append(given)
        return True

    nlscale.ops.memory.kernels.sizes.supports = supports  # type: ignore[assignment]
    cross_entropy.supports = supports  # type: ignore[assignment]
    state = torch.random.get_rng_state()
    check_kernels(model(mixer), 96, dtype, CPU)
    assert torch.equal(torch.random.get_rng_state(), state), "what is drawn must not change a run"
    assert len(calls) >= 2


@pytest.mark.parametrize("scanned", ["hope", "hope-pure", "gated-delta"])
def test_the_kernels_pass(scanned: str, interpreted: Call) -> None:
    interpreted(sound, scanned, torch.bfloat16)


def test_attention_has_no_scan_to_check_and_an_earlier_stage_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "supports", lambda logits: True)
    monkeypatch.setattr(cross_entropy, "row_statistics", None)
    check_kernels(model("attention"), 0, torch.bfloat16, CPU)
    with pytest.raises(TypeError):
        check_kernels(model("attention"), 96, torch.bfloat16, CPU)


@pytest.mark.parametrize("broken", ["reads", "gradient", "nan"])
def test_a_wrong_scan_is_refused_and_named(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.memory_scan

    def wrong(a: Tensor, b: Tensor, q: Tensor, *rest: Any) -> Any:
        read, state = real(a, b.detach() if broken == "gradient" else b, q, *rest)
        if broken == "gradient":
            read = read + 0 * b.sum()
        return {"reads": read * 1.1, "nan": read * float("nan")}.get(broken, read), state

    monkeypatch.setattr(check, "memory_scan", wrong)
    monkeypatch.setattr(check.ScanInputs, "path", "kernels")
    with pytest.raises(TrainingFailed) as caught:
        check_kernels(model("hope"), 0, torch.bfloat16, CPU)
    said = str(caught.value)
    assert "\n" not in said and "train.kernels=false" in said and "memory scan is off by" in said
    if broken == "gradient":
        assert "b of the memory scan" in said


def test_a_wrong_loss_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor, *rest: Tensor) -> None:
        cross_entropy.to_gradient_(logits, *rest, kernels=False)
        logits[3] = 0

    monkeypatch.setattr(cross_entropy, "supports", lambda logits: logits.dtype != torch.float64)
    right = partial(cross_entropy.row_statistics, kernels=False)
    monkeypatch.setattr("nlscale.ops.loss.kernel.row_statistics", right)
    monkeypatch.setattr("nlscale.ops.loss.kernel.to_gradient_", wrong)
    with pytest.raises(TrainingFailed, match="derivative by the logits is off by"):
        check_kernels(model("attention"), 96, torch.bfloat16, CPU)


def test_a_sum_of_gradients_that_rounds_to_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(total: Tensor, d_output: Tensor, x: Tensor) -> None:
        total += d_output.t() @ x

    check_kernels(model("attention"), 0, torch.bfloat16, CPU)
    monkeypatch.setattr(check, "accumulate_product_", rounding)
    with pytest.raises(TrainingFailed, match=r"of a weight's gradients is off by.* torch "):
        check_kernels(model("attention"), 0, torch.bfloat16, CPU)


def test_attention_that_sees_another_document_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_whole_rows(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any, **_: Any) -> Any:
        return within_bounds(q, k, v, bounds[[0, -1]])

    monkeypatch.setattr(check, "takes_packed", lambda q: True)
    monkeypatch.setattr(attention, "takes_packed", lambda q: q.dtype == torch.bfloat16)
    for kernel, refused in ((within_bounds, False), (of_whole_rows, True)):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        with (
            nullcontext()
            if not refused
            else pytest.raises(TrainingFailed, match=r"documents.* torch ")
        ):
            check_kernels(model("attention"), 0, torch.bfloat16, CPU, documents=True)
