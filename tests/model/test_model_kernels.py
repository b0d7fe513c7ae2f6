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
from nlscale.config.vocabulary import Config
from nlscale.errors import TrainingFailed
from nlscale.model.kernels import check_kernels
from nlscale.ops import attention, check
from nlscale.ops.compiler import Compiler, compiler_for
from nlscale.ops.loss import cross_entropy

CPU = torch.device("cpu")


SIZES = [
    "data.dir=none",
    "data.sequence_length=37",  # two chunks and a part of one
    "train.dtype=bf16",
    "train.micro_batch=2",
    "model.d_model=64",
    "model.heads=4",
    "model.memory.chunk=16",
]


def run(*overrides: str) -> Config:
    return recipe.load(None, [*SIZES, *overrides]).config


def sound(*overrides: str) -> None:
    """In the process of the interpreter."""
    import nlscale.ops.memory.kernels.sizes

    calls = []

    def supports(*given: Any) -> bool:
        calls.append(given)
        return True

    nlscale.ops.memory.kernels.sizes.supports = supports  # type: ignore[assignment]
    cross_entropy.supports = supports  # type: ignore[assignment]
    state = torch.random.get_rng_state()
    check_kernels(run(*overrides), 96, CPU)
    assert torch.equal(torch.random.get_rng_state(), state), "what is drawn must not change a run"
    assert len(calls) >= 2


@pytest.mark.parametrize(
    "scanned",
    [
        "model.mixer=hope parallel.tensor=4",
        "model.mixer=hope-pure parallel.tensor=2 train.micro_batch=1",
        "model.mixer=gated-delta train.micro_batch=1",
        "model.mixer=gated-delta data.document_mask=true parallel.tensor=4 train.micro_batch=1",
    ],
)
def test_the_kernels_pass(scanned: str, interpreted: Call) -> None:
    interpreted(sound, *scanned.split())


def test_attention_has_no_scan_to_check_and_an_earlier_stage_no_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cross_entropy, "supports", lambda logits: True)
    monkeypatch.setattr(cross_entropy, "row_statistics", None)
    check_kernels(run("model.mixer=attention"), 0, CPU)
    with pytest.raises(TypeError):
        check_kernels(run("model.mixer=attention"), 96, CPU)


@pytest.mark.parametrize("broken", ["reads", "gradient", "nan"])
def test_a_wrong_scan_is_refused_and_named(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = check.memory_scan

    def wrong(a: Tensor, b: Tensor, q: Tensor, *rest: Any) -> Any:
        if a.dtype == torch.float64:
            return real(a, b, q, *rest)
        read, state = real(a, b.detach() if broken == "gradient" else b, q, *rest)
        if broken == "gradient":
            read = read + 0 * b.sum()
        return {"reads": read * 1.1, "nan": read * float("nan")}.get(broken, read), state

    monkeypatch.setattr(check, "memory_scan", wrong)
    monkeypatch.setattr(check.ScanInputs, "path", "kernels")
    with pytest.raises(TrainingFailed) as caught:
        check_kernels(run("train.micro_batch=1", "parallel.tensor=2"), 0, CPU)
    said = str(caught.value)
    assert "\n" not in said and "train.kernels=false" in said and "memory scan is off by" in said
    if broken == "gradient":
        assert "b of the memory scan" in said


def test_one_wrong_sequence_of_many_is_refused() -> None:
    """As where programs get into each other's way, by however little."""
    torch.manual_seed(0)
    want = {"reads": torch.randn(1, 2, 5, 3), "key": torch.randn(2, 3, 3)}
    got = {name: check._repeated(name, x, 3, 5) * (3 if name == "key" else 1)
           for name, x in want.items()}  # fmt: skip
    assert max(check._errors_of_repetitions(got, want, 3, 5).values()) < 1e-6
    got["reads"][2, 4, 1, 1] *= 1 + 1e-6
    found = check._errors_of_repetitions(got, want, 3, 5)
    assert found["one of several equal reads"] == float("inf") and found["reads"] < 1e-6
    got["key"][4] *= 1.5
    assert check._errors_of_repetitions(got, want, 3, 5)["another head's key"] > 0.1


@pytest.mark.parametrize(
    ("ptxas", "setting"),
    [("12.8", "TRITON_PTXAS_PATH"), ("13.1", "TRITON_PTXAS_BLACKWELL_PATH"), ("13.4", "none")],
)
def test_a_refusal_names_the_compiler_and_where_an_old_one_is_replaced(
    ptxas: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "compiler_for", lambda device: Compiler("3.7.1", ptxas, setting))
    with pytest.raises(TrainingFailed) as caught:
        check.refuse_beyond(0.05, {"reads": 0.9}, "Triton", CPU)
    said = str(caught.value)
    assert "\n" not in said and f"Triton 3.7.1 with ptxas {ptxas}" in said
    assert (f"Point {setting} at a ptxas of CUDA 13.3 or later" in said) == (ptxas != "13.4")
    with pytest.raises(TrainingFailed) as caught:
        check.refuse_beyond(0.05, {"sum": 0.9}, "torch", CPU)
    assert "ptxas" not in str(caught.value) and "Install another version of torch" in str(
        caught.value
    )


@pytest.mark.parametrize(("capability", "major_minor"), [(90, (9, 0)), (80, (8, 0))])
def test_the_compiler_is_the_one_that_triton_calls(
    capability: int, major_minor: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia.compiler import get_ptxas_version

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: major_minor)
    found = compiler_for(torch.device("cuda"))
    assert found is not None and f"release {found.ptxas}," in get_ptxas_version(capability)
    assert compiler_for(CPU) is None


def test_a_wrong_loss_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: Tensor, *rest: Tensor) -> None:
        cross_entropy.to_gradient_(logits, *rest, kernels=False)
        logits[3] = 0

    monkeypatch.setattr(cross_entropy, "supports", lambda logits: logits.dtype != torch.float64)
    right = partial(cross_entropy.row_statistics, kernels=False)
    monkeypatch.setattr("nlscale.ops.loss.kernel.row_statistics", right)
    monkeypatch.setattr("nlscale.ops.loss.kernel.to_gradient_", wrong)
    with pytest.raises(TrainingFailed, match="derivative by the logits is off by"):
        check_kernels(run("model.mixer=attention"), 96, CPU)


def test_a_sum_of_gradients_that_rounds_to_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(total: Tensor, d_output: Tensor, x: Tensor) -> None:
        total += d_output.t() @ x

    check_kernels(run("model.mixer=attention"), 0, CPU)
    monkeypatch.setattr(check, "accumulate_product_", rounding)
    with pytest.raises(TrainingFailed, match=r"of a weight's gradients is off by.* torch "):
        check_kernels(run("model.mixer=attention"), 0, CPU)


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
            check_kernels(run("model.mixer=attention", "data.document_mask=true"), 0, CPU)


@pytest.mark.parametrize("name", ["key", "reads"])
def test_numbers_that_are_none_in_one_of_several_heads_are_found(name: str) -> None:
    of_sequence = torch.randn(2, 4, 3, 8)
    got = {
        "reads": of_sequence[:1, :2].repeat(2, 2, 1, 1),
        "key": torch.randn(2, 8, 8).repeat(2, 1, 1),
    }
    want = {"reads": got["reads"][:1, :2].clone(), "key": got["key"][:2] / 2}
    right = check._errors_of_repetitions(got, want, rows=2, heads=4)
    assert max(right.values()) < 1e-6
    got[name][..., 3, 0, 0] = float("nan")
    wrong = check._errors_of_repetitions(got, want, rows=2, heads=4)
    with pytest.raises(TrainingFailed):
        check.refuse_beyond(0.05, wrong, "torch", CPU)
