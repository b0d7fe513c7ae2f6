"""Where megatron-core is imported, no process that is forked later is kept from a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from nlscale.parallel.cpu import import_megatron_core

ASKS = "PYTORCH_NVML_BASED_CUDA_CHECK"


@pytest.mark.parametrize("before", [None, "0"])
def test_whether_there_is_a_gpu_is_asked_without_beginning_cuda(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says of `is_available`: it poisons forks, unless it asks NVML."""
    asked = []

    def is_available() -> bool:
        asked.append(os.environ.get(ASKS))
        return True

    monkeypatch.delenv(ASKS, raising=False)
    if before is not None:
        monkeypatch.setenv(ASKS, before)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    import_megatron_core()
    assert asked == ["1"] and os.environ.get(ASKS) == before
