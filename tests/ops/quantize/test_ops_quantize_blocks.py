"""Gradients as integers: against blocks rounded one by one in float64, and exact to the bit."""

from __future__ import annotations

import math
import struct
from unittest import mock

import pytest
import torch
from ops.interpreter import Call
from torch import Tensor

from nlscale.ops.check import BOUNDS
from nlscale.ops.quantize import blocks
from nlscale.ops.quantize.blocks import pack, unpack
from nlscale.ops.quantize.rows import Rows, row_bytes
from nlscale.verify.compiled import compiled, recorded

BLOCK = 128
CPU = torch.device("cpu")
RANGES = {
    "one": [(0, 1)],
    "a block": [(0, BLOCK)],
    "odd": [(3, 1001), (1100, 129), (0, 3), (1300, 0), (1300, 7)],
    "nothing": [(0, 0)],
}


def problem(case: str, length: int = 1400) -> tuple[Tensor, Tensor]:
    """Values, and errors as the crossing before has left them."""
    scale = torch.randn(length).exp()  # blocks in which some are far larger than others
    values, error = torch.randn(length) * scale, 0.01 * torch.randn(length)
    if case == "zeros":
        values[256:600], error[256:600] = 0.0, 0.0
    elif case == "denormal":
        values, error = values * 1e-41, error * 1e-41
    elif case == "huge":
        values, error = values * 1e36 / values.abs().amax(), error * 1e30
    elif case == "one large":
        values[::200] = 1e20
    return values, error


def integer_row(total: list[float], bits: int) -> tuple[list[float], list[int]]:
    """Scales and integers of a row, value by value."""
    most, scales, integers = 2 ** (bits - 1) - 1, [], []
    for first in range(0, len(total), BLOCK):
        block = total[first : first + BLOCK]
        exact = struct.unpack("f", struct.pack("f", max(map(abs, block)) / most))[0]
        (bit,) = struct.unpack("i", struct.pack("f", exact))
        (scale,) = struct.unpack("f", struct.pack("i", -(-bit // 256) * 256))
        scales.append(scale)
        integers += [round(v / scale) if scale else 0 for v in block]  # ties to even
    return scales, integers


@pytest.mark.parametrize("case", ["", "zeros", "denormal", "huge", "one large"])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_blocks_rounded_one_by_one(bits: int, ranges: str, case: str, seed: int) -> None:
    values, error = problem(case)
    rows = Rows.of(RANGES[ranges], bits, BLOCK, CPU)
    left, back = torch.full_like(values, 7.0), torch.full_like(values, 9.0)
    packed = pack(values, error, left, rows)
    unpack(packed, rows, back)
    inside = torch.zeros(len(values), dtype=torch.bool)
    begin = 0
    for start, length in RANGES[ranges]:
        here = slice(start, start + length)
        inside[here] = True
        total = values[here] + error[here]
        scales, integers = integer_row(total.tolist(), bits)
        size = row_bytes(length, bits, BLOCK)
        assert size == 4 * math.ceil(length / BLOCK) + 4 * math.ceil(length * bits / 32)
        row = bytes(packed[begin : begin + size].tolist())
        begin += size
        assert list(struct.unpack(f"{len(scales)}f", row[: 4 * len(scales)])) == scales
        payload = row[4 * len(scales) :]
        digits = [x >> shift & 15 for x in payload for shift in (0, 4)] if bits == 4 else payload
        # the quotient is rounded once, to fp32, before it is rounded to an integer
        signed = [x - 2**bits * (x >= 2 ** (bits - 1)) for x in digits][:length]
        for got, want, v, at in zip(signed, integers, total.tolist(), range(length), strict=True):
            of = scales[at // BLOCK]
            assert got == want or abs(v / of - (got + want) / 2) < 1e-5
        sent = torch.tensor(signed) * torch.tensor(scales).repeat_interleave(BLOCK)[:length]
        assert torch.equal(back[here], sent)
        # nothing is lost, to the bit, in fp32 and without rounding
        assert torch.equal(back[here] + left[here], total)
        assert torch.equal(back[here].double() + left[here].double(), total.double())
        bound = torch.tensor(scales).repeat_interleave(BLOCK)[:length] / 2
        assert (left[here].abs() <= bound * (1 + 1e-5) + 2.0**-141).all()
    assert begin == rows.bytes == len(packed)
    assert (left[~inside] == 7.0).all() and (back[~inside] == 9.0).all(), "beside the rows"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_scale_is_hardly_larger_than_the_largest_value_asks(bits: int, seed: int) -> None:
    values, error = torch.randn(4096), torch.zeros(4096)
    rows, left = Rows.of([(0, 4096)], bits, BLOCK, CPU), torch.empty(4096)
    scales = pack(values, error, left, rows)[: 4 * 32].view(torch.float32)
    least = values.view(32, BLOCK).abs().amax(1) / (2 ** (bits - 1) - 1)
    assert (scales >= least * (1 - 1e-7)).all() and (scales <= least * (1 + 2.0**-15)).all()


def spoiled(bits: int, kernels: bool) -> None:
    blocks.supports = lambda values: kernels  # type: ignore[assignment]
    values, error = problem("", 3 * BLOCK)
    values[5], values[BLOCK + 9] = float("nan"), -float("inf")
    rows, left, back = Rows.of([(0, 384)], bits, BLOCK, CPU), values.clone(), values.clone()
    unpack(pack(values, error, left, rows), rows, back)
    for found in (left, back):
        assert found[: 2 * BLOCK].isnan().all(), "of the blocks that hold them, all of it"
        assert found[2 * BLOCK :].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_seen_on_the_other_side(
    bits: int, monkeypatch: pytest.MonkeyPatch, interpreted: Call
) -> None:
    monkeypatch.setattr(blocks, "supports", blocks.supports)  # put back at the end
    spoiled(bits, kernels=False)
    interpreted(spoiled, bits, kernels=True)


def copies_are_summed(bits: int, kernels: bool) -> None:
    blocks.supports = lambda values: kernels  # type: ignore[assignment]
    values, zeros = torch.randn(3, 301), torch.zeros(301)
    rows, each = Rows.of([(1, 300)], bits, BLOCK, CPU), []
    want = torch.zeros(301)
    for v in values:
        each.append(pack(v, zeros, torch.empty(301), rows))
        back = torch.zeros(301)
        unpack(each[-1], rows, back)
        want += back  # in fp32, in their order
    out = torch.zeros(301)
    unpack(torch.cat(each), rows, out, copies=3)
    assert torch.equal(out, want)


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_are_added_up_in_their_order(
    bits: int, seed: int, monkeypatch: pytest.MonkeyPatch, interpreted: Call
) -> None:
    monkeypatch.setattr(blocks, "supports", blocks.supports)
    copies_are_summed(bits, kernels=False)
    interpreted(copies_are_summed, bits, kernels=True)


def kernels_are_the_torch_form(seed: int, bits: int, case: str, ranges: str) -> None:
    """In the process of the interpreter: to the bit, over several programs a row."""
    from nlscale.ops.quantize.kernels import packed as fused

    fused._VALUES = 2 * BLOCK
    torch.manual_seed(seed)
    values, error = problem(case)
    rows, found = Rows.of(RANGES[ranges], bits, BLOCK, CPU), []
    for kernels in (False, True):
        blocks.supports = lambda values, kernels=kernels: kernels  # type: ignore[assignment]
        left, back = torch.full_like(values, 7.0), torch.full_like(values, 9.0)
        row = pack(values, error, left, rows)
        unpack(row, rows, back)
        found.append((left, back))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", ["", "zeros", "denormal", "huge", "one large"])
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels(bits: int, case: str, seed: int, interpreted: Call) -> None:
    for ranges in RANGES if case == "" else ["odd"]:
        interpreted(kernels_are_the_torch_form, seed, bits, case, ranges)


def checked(bits: int, breaks: bool) -> dict[str, float]:
    """What the check before a run's first step finds, in the process of the interpreter."""
    from nlscale.ops import check
    from nlscale.ops.quantize.kernels import packed as fused

    blocks.supports = lambda values: True  # type: ignore[assignment]
    with mock.patch.object(fused, "largest", lambda bits: 2**bits // 2 - 1 - breaks):
        return check.packing_errors(bits, BLOCK, CPU)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_check_before_the_first_step_finds_a_wrong_kernel(
    bits: int, seed: int, interpreted: Call
) -> None:
    assert list(interpreted(checked, bits, False).values()) == [0.0, 0.0]
    assert max(interpreted(checked, bits, True).values()) > BOUNDS[torch.float32]


@pytest.mark.parametrize("bits", [8, 4])
def test_they_compile_for_gpus(bits: int) -> None:
    from nlscale.ops.quantize.kernels import packed as fused

    flat = torch.empty(10_000, device="meta")
    rows = Rows.of([(0, 9_000), (9_000, 1_000)], bits, BLOCK, torch.device("meta"))
    row = torch.empty(2 * rows.bytes, dtype=torch.uint8, device="meta")
    with recorded() as launches:
        fused.pack(flat, flat, flat, row, rows)
        fused.unpack(row, rows, flat, copies=2)
    assert [launch.name for launch in launches] == ["pack", "unpack"]
    for launch in launches:
        assert compiled(launch, "sm_90").asm["cubin"]
