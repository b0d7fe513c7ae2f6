"""What each part of `nlscale bench device` finds, on a CPU and on a stand-in for a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import world
from torch.autograd import DeviceType

from nlscale.bench.trace import STEPS as TRACED
from nlscale.bench.trace import account_of
from nlscale.errors import UserError
from nlscale.model.sizes import level_parameters
from nlscale.telemetry.files import to_json
from nlscale.verify.device.child import measured
from nlscale.verify.device.measures import config_of, of_floor
from nlscale.verify.device.parts import PARTS, STEPS

BY_NAME = {part.name: part for part in PARTS}


def found_by(name: str, folder: Path) -> dict[str, Any]:
    return json.loads(to_json(measured(BY_NAME[name], folder / name, True)))


def test_every_part_is_a_function_of_its_own_arguments() -> None:
    """The names that only the parts' processes look up."""
    import importlib
    import inspect

    for part in PARTS:
        module, _, function = part.measure.partition(":")
        called = getattr(importlib.import_module(module), function)
        inspect.signature(called).bind(Path(), True, **part.given)
        assert 0 < part.about < part.most <= 600


ALONE = ["ceilings", "kernels.64.64", "scan.4k", "step.4k.hope", "step.4k.torch", "costs", "decode"]


@pytest.mark.parametrize("name", ALONE)
def test_parts_on_a_cpu(name: str, tmp_path: Path) -> None:
    (found,) = world.run(1, found_by, name, tmp_path)
    assert found["says"] and "\n" not in found["says"]
    if name.startswith("step"):
        assert found["tokens_per_second"] > 0 and found["peak_memory_bytes"] is None
    if name == "scan.4k":
        row = next(row for row in found["rows"] if row["mixer"] == "hope")
        assert found["of_floor"] == of_floor(row) > 1
    if name == "kernels.64.64":
        assert found["ok"] and len(found["rows"]) >= 9 and 0 < found["worst"] <= 1
    if name == "costs":
        assert len(found["largest_costs"]) == 5 and found["host_waits"] is None
        assert json.loads((tmp_path / name / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize("name", ["links", "overlap"])
def test_parts_of_several_ranks(name: str, tmp_path: Path) -> None:
    mine, other = world.run(2, found_by, name, tmp_path, ranks_per_node=1)
    for found in (mine, other):
        assert found["ranks"] == found["nodes"] == 2
    if name == "links":
        assert mine["groups"]["between_nodes"]["ranks"] == 2
        assert mine["groups"]["within_node"] is None and "between nodes" in mine["says"]
    else:
        assert mine["because"] is None and mine["bytes_per_step"] > 0
        assert "without overlap" in mine["says"]


def on_stand_in(name: str, folder: Path) -> tuple[dict[str, Any], int]:
    """What is found there, and how many kernels were launched."""
    from nlscale.step import trainer as module

    module.check_kernels = lambda *args: None  # type: ignore[assignment] # compares numbers
    with gpu.stand_in(numbers=True):
        found = found_by(name, folder)
    return found, sum(gpu.launches.values())


@pytest.mark.parametrize("name", ["ceilings", "scan.4k", "step.4k.hope"])
def test_parts_on_a_stand_in_for_a_gpu(name: str, tmp_path: Path) -> None:
    ((found, launched),) = world.run(1, on_stand_in, name, tmp_path)
    assert (launched > 0) == (name != "ceilings")
    if name.startswith("step"):
        assert found["peak_memory_bytes"] > 0 and "at most" in found["says"]


def on_the_second_gpu(folder: Path) -> str:
    import os

    os.environ |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    with gpu.stand_in(numbers=True), pytest.raises(UserError) as refused:
        found_by("ceilings", folder)
    return str(refused.value)


def test_each_rank_measures_its_own_gpu(tmp_path: Path) -> None:
    (said,) = world.run(1, on_the_second_gpu, tmp_path)
    assert said.startswith("LOCAL_RANK=1 has no GPU: this process sees 1")


@pytest.mark.parametrize("size", STEPS)
def test_rows_of_a_step_are_of_one_size_of_model(size: str) -> None:
    parameters = {}
    for row in STEPS[size].rows:
        config = config_of(size, row, tiny=False)
        assert config.model.vocabulary is not None
        assert config.data.sequence_length == STEPS[size].length
        assert config.train.global_batch == config.train.micro_batch == STEPS[size].batch
        parameters[row] = sum(level_parameters(config, config.model.vocabulary))
    assert max(parameters.values()) < 1.02 * min(parameters.values()), parameters


def test_what_the_host_waits_for_is_counted_by_the_step() -> None:
    def event(key: str, count: int, device: DeviceType = DeviceType.CPU, us: float = 0.0) -> Any:
        return SimpleNamespace(
            key=key, count=count, device_type=device, self_device_time_total=us,
            self_cpu_time_total=1.0, is_user_annotation=False,
        )  # fmt: skip

    events = [
        event("cudaEventSynchronize", TRACED),
        event("cudaDeviceSynchronize", 1),  # the profiler's own, at its end
        event("cudaLaunchKernel", 100 * TRACED),
        event("cuLaunchKernelEx", 20 * TRACED),
        event("Memcpy HtoD (Pageable -> Device)", 3 * TRACED, DeviceType.CUDA, 10.0),
        event("Memcpy DtoH (Device -> Pinned)", TRACED, DeviceType.CUDA, 10.0),
        event("gemm", 5 * TRACED, DeviceType.CUDA, 4000.0 * TRACED),
    ]
    found = account_of(events, on_gpu=True)
    assert found["host_waits"] == 1 and found["launches"] == 120
    assert found["pageable_copies"] == 3
    assert found["busy_ms"] == pytest.approx(4 + 0.02 / TRACED)
    assert found["largest_costs"][0]["name"] == "gemm"
    assert account_of(events, on_gpu=False)["host_waits"] is None
