"""The check before the first step launches the very kernels that steps do (see tests/gpu.py).

Triton compiles a kernel for each way in which its integers are 1, multiples of 16 or neither: what
is compared here is that, for every argument of every launch, by Triton's own rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pytest
import torch
import world
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction

from nlscale.config import recipe
from nlscale.levels.spectrum import spectrum
from nlscale.ops import check, pointwise
from nlscale.ops.documents import Documents
from nlscale.parallel.layout import process_groups
from nlscale.step.micro_batches import Batch
from nlscale.step.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = [
    "data.dir=none",
    "model.layers=1",
    "parallel.pipeline=1",
    "levels=[1]",
    "train.recompute=[]",
]
Key = tuple[Any, ...]


def compiled_by(kernel: Any, given: tuple[Any, ...], options: dict[str, Any]) -> Key:
    """What makes Triton compile one kernel or another."""
    values = dict(zip(kernel.arg_names, given, strict=False)) | options
    parts: list[Any] = [kernel.__name__]
    for parameter in kernel.params:
        value = values.pop(parameter.name)
        if isinstance(value, torch.Tensor):
            parts.append(str(value.dtype))  # all are aligned: none is a view
        elif parameter.is_constexpr:
            parts.append(value)
        else:
            special, aligned = (
                not parameter.do_not_specialize,
                not parameter.do_not_specialize_on_alignment,
            )
            parts.append(native_specialize_impl(BaseBackend, value, False, special, aligned))
    return *parts, *sorted(values.items())


def launched(name: str, overrides: list[str], ranks: int) -> tuple[set[Key], set[Key]]:
    """By the check, and by a step of one micro batch."""
    now: set[Key] = set()

    def launch(kernel: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        now.add(compiled_by(kernel, given, options))

    any_check: Any = check
    any_pointwise: Any = pointwise
    any_pointwise._compile = lambda function: function  # importing a compiler takes seconds
    scan = check.scan_results
    any_check.ScanInputs.to = lambda *_: None  # no numbers are compared, so none in float64
    any_check.scan_results = lambda inputs, *given: inputs and scan(inputs, *given)
    any_check.relative_errors = any_check._errors_of_repetitions = lambda *_: {}
    config = recipe.load(
        RECIPES / name, [*SMALL, *overrides, f"parallel.ranks_per_node={ranks}"]
    ).config
    rows, length, vocabulary = config.train.micro_batch, config.data.sequence_length, 32000
    config.train.global_batch = rows
    with gpu.stand_in(0, ranks), process_groups(config) as layout:
        JITFunction.run = launch  # type: ignore[method-assign]
        levels = spectrum(config.levels, tokens_per_step=100)
        trainer = Trainer.build(config, layout, levels, vocabulary, draws=False)
        checked, now = now, set()
        tokens = np.ones((rows, length), dtype=np.int64)
        documents = None
        if config.data.document_mask:
            tokens[:, :: 3 * config.model.memory.chunk + 1] = 0
            documents = Documents.of(tokens, 0, config.model.memory.chunk, layout.device)
        given = torch.empty(rows, length, dtype=torch.int64, device=layout.device)
        trainer.take_step([Batch(given, given, rows, documents)])
    return checked, now


CASES = {
    "hope-340m": "",
    "hope-760m": "data.sequence_length=4100 model.mixer=gated-delta",  # 12 heads, a rest of 4
    "hope-1.3b": "data.sequence_length=32768 train.micro_batch=1",
    "hope-7b": "data.document_mask=true",
    "hope-70b": "model.mixer=hope-pure",  # 8 local heads
}


@pytest.mark.parametrize("size", CASES)
def test_what_is_checked_is_what_a_step_runs(size: str) -> None:
    overrides = CASES[size].split()
    ranks = recipe.load(RECIPES / f"{size}.yaml").config.parallel.tensor
    ((checked, stepped),) = world.run(1, launched, f"{size}.yaml", overrides, ranks)
    assert stepped and stepped <= checked, "\n".join(map(str, stepped - checked))
    masked = any("document_mask" in override for override in overrides)
    assert masked or checked == stepped  # of documents other steps have others
