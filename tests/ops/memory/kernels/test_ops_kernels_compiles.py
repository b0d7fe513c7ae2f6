"""Every kernel compiles for GPUs as training launches it, and fits there. Needs no GPU."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.problems import MODES
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

import nlscale.ops.memory.kernels.sizes
from nlscale import cli
from nlscale.bench.scan import Size, model_of
from nlscale.model.mixers.memory.check import inputs_of
from nlscale.model.mixers.memory.facts import MemoryFacts
from nlscale.model.mixers.table import mixer
from nlscale.ops.check import scan_results
from nlscale.ops.device import assuming
from nlscale.verify.compiled import (
    TARGETS,
    Launch,
    compiled,
    is_serialized,
    loss_launches,
    recorded,
    resident_programs,
    scan_launches,
    usage_of,
)

MIXERS = {"hope": "hope", "pure": "hope-pure", "gated-delta": "gated-delta"}
BY_BOTH = ("pi", "reads_backward", "inputs_backward")
"""Kernels that the other ptxas is tried on: a serial one, one that is short of registers by its
launch, and one that adds up."""
PTX = ".version 8.7"
"""Old enough for every ptxas, and new enough for the kernels."""


def launches(
    mode: str,
    batch: int,
    length: int,
    heads: int,
    d: int,
    chunk: int,
    documents: bool = False,
    generation: int = 9,
    **other: bool | float,
) -> list[Launch]:
    """Of a forward and backward pass; with other rules."""
    facts, size = mixer(MIXERS[mode]), Size(batch, length, heads, d)
    assert isinstance(facts, MemoryFacts)
    rules = replace(facts.rules(model_of(MIXERS[mode], size, chunk)), **other)
    assert rules.main_memory == MODES[mode].main_memory
    with assuming(generation):
        forward, backward = scan_launches(rules, size, facts.modifies_itself, documents)
    return forward + backward


def fits(kernel: Any, target: str) -> bool:
    made, used = kernel.metadata, usage_of(kernel.asm["cubin"])
    limits = TARGETS[target]
    return resident_programs(limits, made.num_warps, used.registers, made.shared) > 0


@pytest.mark.parametrize(
    ("mode", "chunk", "heads", "d", "target", "documents"),
    [
        ("hope", 64, 16, 64, "sm_90", True),
        ("hope", 64, 8, 128, "sm_90", False),
        ("hope", 16, 16, 64, "sm_90", False),
        ("hope", 64, 16, 64, "sm_80", False),
        ("pure", 64, 16, 64, "sm_90", False),
        ("gated-delta", 64, 16, 64, "sm_90", False),
    ],
)
def test_every_kernel_compiles_and_fits(
    mode: str, chunk: int, heads: int, d: int, target: str, documents: bool, tmp_path: Path
) -> None:
    generation = int(target.removeprefix("sm_")) // 10
    # writes of both forms: at the sizes of the recipes
    other = {"decayed_write": True, "strength": 2.0} if documents else {}
    noted = launches(mode, 8, 4096, heads, d, chunk, documents, generation, **other)
    assert len(noted) == {"hope": 10, "pure": 7, "gated-delta": 7}[mode]
    for launch in noted:
        kernel = compiled(launch, target)
        assert fits(kernel, target), f"{launch.name} takes {kernel.metadata.shared} bytes"
        if documents and launch.name in BY_BOTH:
            assert not is_serialized(kernel.asm["cubin"]), launch.name
            assemble(kernel, target, tmp_path)


def assemble(kernel: Any, target: str, folder: Path) -> None:
    """With the other ptxas that Triton brings: which it calls itself depends on its version."""
    both = {knobs.nvidia.ptxas.path, knobs.nvidia.ptxas_blackwell.path}
    (other,) = both - {get_ptxas(int(target.removeprefix("sm_"))).path}
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(re.sub(r"^\.version [\d.]+", PTX, kernel.asm["ptx"], count=1, flags=re.M))
    subprocess.run([other, f"--gpu-name={target}a", source, "-o", cubin], check=True)
    assert usage_of(cubin.read_bytes()).registers and not is_serialized(cubin.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_compiles(target: str) -> None:
    forward, backward = loss_launches(8)
    noted = forward + backward
    assert [launch.name for launch in noted] == ["statistics", "gradient"]
    assert all(fits(compiled(launch, target), target) for launch in noted)


@pytest.mark.parametrize(
    ("columns", "known"), [(32000, "divisible by 16"), (32001, "nothing"), (1, "all of it")]
)
def test_integers_are_specialised_as_by_a_launch(columns: int, known: str) -> None:
    (statistics,), _ = loss_launches(4, columns)
    code = compiled(statistics, "sm_90").asm["ttir"]
    given = re.search(r"%columns: i32( {tt.divisibility = 16)?", code)
    if given is None:
        assert known == "all of it"
    else:
        assert known == ("divisible by 16" if given[1] else "nothing")


@pytest.mark.parametrize("mode", MIXERS)
def test_what_is_compiled_is_what_a_scan_launches(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nlscale.ops.memory.kernels.sizes, "supports", lambda *inputs: True)
    facts, size = mixer(MIXERS[mode]), Size(2, 4096, 3, 32)
    assert isinstance(facts, MemoryFacts)
    inputs = inputs_of(
        facts, model_of(MIXERS[mode], size, 16), 2, 4096, torch.bfloat16, torch.device("meta")
    )
    with recorded() as noted, assuming(9):
        scan_results(inputs, torch.empty_like(inputs.leaves["a"]))
    want = launches(mode, 2, 4096, 3, 32, 16)
    assert [described(launch) for launch in noted] == [described(launch) for launch in want]


def described(launch: Launch) -> tuple[Any, ...]:
    def of(x: Any) -> Any:
        return (x.shape, x.dtype, x.is_contiguous()) if isinstance(x, torch.Tensor) else x

    return launch.name, launch.grid, [of(x) for x in launch.given], launch.options


def test_older_gpus_are_asked_for_what_suits_them() -> None:
    """An A100 spills where Hopper's matrix instructions do not."""
    registers = {}
    for generation in (8, 9):
        noted = launches("hope", 1, 64, 1, 64, 64, generation=generation)
        registers[generation] = {x.options.get("maxnreg") for x in noted}
    assert registers == {8: {None}, 9: {None, 168}}


@pytest.mark.parametrize("mode", MIXERS)
def test_any_number_of_sequences_fits_a_grid(mode: str) -> None:
    batch, heads, chunks = 5000, 16, 12
    for launch in launches(mode, batch, 16 * chunks, heads, 16, 16):
        across, *others = launch.grid
        assert across < 2**31 and all(size < 2**16 for size in others)
        of_chunks = launch.name.startswith(("writes", "reads"))
        assert launch.programs == batch * heads * (chunks if of_chunks else 1) or (
            launch.name == "inputs_backward" and launch.programs % (batch * heads) == 0
        )


@pytest.mark.parametrize(
    ("target", "warps", "registers", "kibibytes", "want"),
    [
        ("sm_90", 4, 255, 0, 2),
        ("sm_90", 4, 169, 0, 2),
        ("sm_90", 4, 168, 0, 3),
        ("sm_90", 8, 255, 0, 1),
        ("sm_90", 4, 32, 0, 16),
        ("sm_90", 4, 128, 113, 2),
        ("sm_90", 4, 128, 114, 1),
        ("sm_90", 4, 128, 228, 0),
        ("sm_80", 4, 128, 163, 1),
        ("sm_80", 4, 128, 164, 0),
        ("sm_80", 4, 128, 81, 2),
    ],
)
def test_programs_that_a_multiprocessor_holds(
    target: str, warps: int, registers: int, kibibytes: int, want: int
) -> None:
    """Figures of NVIDIA's occupancy calculator."""
    assert resident_programs(TARGETS[target], warps, registers, kibibytes * 1024) == want


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "scan", "--compiled", *arguments])
    return ended.value.code, *capsys.readouterr()


def test_the_command_says_what_is_made_of_one_token(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--sizes", "1x1x1x16", "--chunk", "16", "--mixers", "hope")
    code, out, _ = bench(capsys, "sm_90", *size, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["target"] == "sm_90" and re.fullmatch(r"\d+\.\d+\.\d+", result["ptxas"])
    rows = {(row["pass"], row["kernel"]): row for row in result["rows"]}
    assert [name for way, name in rows if way == "forward"] == [
        "pi", "writes", "main", "reads", "statistics",
    ]  # fmt: skip
    for row in result["rows"]:
        assert 16 <= row["registers"] <= 255 and row["resident"] >= 2 and row["programs"] <= 8
    code, out, _ = bench(capsys, "sm_90", *size)
    line = next(line for line in out.splitlines() if "reads_backward" in line)
    row = rows["backward", "reads_backward"]
    numbers = ("programs", "warps", "stages", "registers", "stack_bytes")
    assert code == 0 and line.split()[-7:-2] == [str(row[name]) for name in numbers]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["sm_75"], "sm_75 is not known; it is one of sm_80, sm_90, sm_100"),
        (["sm_90", "--mixers", "attention"], "attention scans no memory"),
        (["sm_90", "--sizes", "1x64x2x96"], "no kernels for hope with heads of 96"),
        (["sm_90", "--mixers", "hope-paper"], "no kernels for hope-paper"),
    ],
)
def test_what_cannot_be_compiled_is_named(
    arguments: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = bench(capsys, *arguments)
    assert code == 2 and cause in err and err.count("\n") == 1


def test_a_compiler_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.backends.nvidia.compiler as backend

    def missing(*given: Any) -> str:
        raise RuntimeError("Cannot find ptxas")

    monkeypatch.setattr(backend, "get_ptxas_version", missing)
    code, _, err = bench(capsys, "sm_90")
    assert code == 2 and "finds no ptxas for sm_90" in err and "TRITON_PTXAS_PATH" in err
