"""What is known of devices, by the names that drivers give them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nlscale.config.vocabulary import Dtype, ParallelConfig
from nlscale.parallel import devices

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("stand-in", None),
    ],
)
def test_peaks_are_those_of_the_whole_gpu_of_that_name(
    name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else tflops * 1e12
    assert devices.peak_flops(GPU, Dtype.bf16) == expected
    assert devices.peak_flops(GPU, Dtype.fp32) is None
    assert devices.peak_flops(torch.device("cpu"), Dtype.bf16) is None


def test_memory_is_that_of_this_process_and_not_of_the_one_that_started_it() -> None:
    program = (
        "import torch\nfrom nlscale.parallel.devices import peak_memory\n"
        "print(peak_memory(torch.device('cpu')))"
    )
    held = torch.ones(200_000_000)  # 800 MB
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 1e8 < int(ended.stdout.split()[-1]) < held.nbytes, ended.stderr


def test_one_queue_is_warned_about_where_reductions_would_fill_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(os.environ, "CUDA_DEVICE_MAX_CONNECTIONS", "1")
    layout: Any = SimpleNamespace(nodes=2, device=GPU)
    (line,) = devices.queue_warnings(ParallelConfig(), layout)
    assert "leave the variable unset" in line
    assert not devices.queue_warnings(replace(ParallelConfig(), overlap=False), layout)
    layout.nodes = 1
    assert not devices.queue_warnings(ParallelConfig(), layout)
