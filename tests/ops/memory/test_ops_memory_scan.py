"""The chunk form of the memory against the token-by-token reference, and what it promises."""

from __future__ import annotations

import random

import pytest
import torch
from ops.problems import CASES, MODES, Problem, assert_same, conditions, relative_errors
from torch import Tensor

from nlscale.ops.memory.rules import MemoryState
from nlscale.ops.memory.scan import memory_scan

every_mode = pytest.mark.parametrize("mode", MODES)

ROUNDINGS = 500
"""Relative errors may be so many roundings, times what the problem itself magnifies them by. In 60
seeds of every mode and case they were at most 60 in fp32 and 90 in float64."""


def compare(problem: Problem) -> None:
    """In fp32 and in float64, of the same inputs."""
    exact = problem.cast(torch.float32).cast(torch.float64)
    exact_read = exact.reference()
    weight = torch.randn_like(exact_read)
    want = {"read": exact_read, **exact.gradients((exact_read * weight).sum())}
    magnified = conditions(exact, want, weight)
    for dtype in (torch.float64, torch.float32):
        given = exact.cast(dtype)
        read, _ = given.scan()
        assert read.dtype == dtype
        got = {"read": read, **given.gradients((read * weight.to(dtype)).sum())}
        for name, error in relative_errors(got, want).items():
            bound = ROUNDINGS * torch.finfo(dtype).eps / 2 * (1 + magnified[name])
            assert error <= bound, f"{name}, {dtype}: relative error {error:.1e} > {bound:.1e}"


@pytest.mark.parametrize("length", [1, 3, 4, 11])
@every_mode
def test_reads_and_gradients_are_those_of_the_recurrence(mode: str, length: int, seed: int) -> None:
    compare(Problem(mode, length))


@pytest.mark.parametrize("case", CASES)
@every_mode
def test_extreme_inputs_are_as_accurate(mode: str, case: str, seed: int) -> None:
    compare(Problem(mode, 11, case))


@every_mode
def test_gradcheck_from_the_middle_of_a_chunk_with_states_in_and_out(mode: str, seed: int) -> None:
    problem, d = Problem(mode, 4, d=2, heads=1, batch=1, chunk=2), 2
    names = list(problem.leaves)
    static, main = mode == "gated-delta", problem.rules.main_memory
    start = None if static else torch.randn(1, 1, d, d, dtype=torch.float64, requires_grad=True)
    rows = d * (main + (not static))
    current = torch.randn(1, 1, rows, d, dtype=torch.float64, requires_grad=True)

    def run(current: Tensor, start: Tensor | None, *leaves: Tensor) -> tuple[Tensor, ...]:
        problem.leaves = dict(zip(names, leaves, strict=True))
        read, state = problem.scan(MemoryState(start, current, torch.tensor([1])))
        return (read, state.current) + (() if state.start is None else (state.start,))

    assert torch.autograd.gradcheck(run, (current, start, *problem.leaves.values()))


@every_mode
def test_a_stream_in_random_pieces_is_the_whole(mode: str, seed: int) -> None:
    problem = Problem(mode, 23)
    whole, end = problem.scan()
    reads, state, at = [], None, 0
    lengths = []
    while at < 23:
        lengths.append(min(random.Random(seed + at).randint(1, 9), 23 - at))
        piece = [x[:, :, at : at + lengths[-1]] for x in problem.inputs()]
        read, state = memory_scan(*piece, problem.weights(), problem.rules, state)
        reads.append(read)
        at += lengths[-1]
    assert state is not None and state.position.tolist() == end.position.tolist() == [23 % 4] * 2
    pieces = {"read": torch.cat(reads, 2), "current": state.current}
    want = {"read": whole, "current": end.current}
    if state.start is not None and end.start is not None:
        pieces["start"], want["start"] = state.start, end.start
    assert_same(pieces, want, 1e-13)
    # the gradient goes through every carried state, and from the last one
    weights = {k: torch.randn_like(v) for k, v in want.items()}
    losses = [sum((w * x[k]).sum() for k, w in weights.items()) for x in (pieces, want)]
    assert_same(problem.gradients(losses[0]), problem.gradients(losses[1]), 1e-12)


@every_mode
def test_no_read_depends_on_a_later_token(mode: str, seed: int) -> None:
    problem = Problem(mode, 13)
    before, _ = problem.scan()
    t = seed % 12 + 1
    with torch.no_grad():
        for x in problem.inputs():
            x[:, :, t:] += torch.randn_like(x[:, :, t:])
    after, _ = problem.scan()
    assert torch.equal(before[:, :, :t], after[:, :, :t])
    assert not torch.equal(before[:, :, t], after[:, :, t])


def test_the_first_token_reaches_the_last_read_through_both_memories(seed: int) -> None:
    problem = Problem("hope", 21, batch=1, heads=1)  # six chunks
    _, state = (cut := problem.cast(torch.float64)).scan()
    first = [x[:, :, :4] for x in problem.inputs()]
    rest = [x[:, :, 4:].detach() for x in problem.inputs()]
    _, state = memory_scan(*first, problem.weights(), problem.rules)
    for kept in ("Pi", "S"):
        pi, s = state.current.split(5, dim=2)
        current = torch.cat([pi, s.detach()] if kept == "Pi" else [pi.detach(), s], dim=2)
        start = pi if kept == "Pi" else pi.detach()
        read, _ = memory_scan(
            *rest, cut.weights(), problem.rules, MemoryState(start, current, state.position)
        )
        (grad,) = torch.autograd.grad(
            read[:, :, -1].square().sum(), problem.leaves["b"], retain_graph=True
        )
        assert grad[:, :, 0].abs().max() > 1e-9, kept


def test_float32_gradients_of_anchored_hope_hold_over_2048_tokens(seed: int) -> None:
    problem = Problem("hope", 2048, d=16, batch=1, dtype=torch.float32, chunk=64)
    exact = problem.cast(torch.float64)
    (low, _), (high, _) = problem.scan(), exact.scan()
    weight = torch.randn_like(high)
    got = {"read": low, **problem.gradients((low * weight.float()).sum())}
    want = {"read": high, **exact.gradients((high * weight).sum())}
    assert_same(got, want, 3e-5)  # 0.5e-6 to 1.5e-6 over ten seeds, once 4.5e-6


def test_a_low_precision_input_is_computed_in_float32(seed: int) -> None:
    problem = Problem("hope", 9, dtype=torch.bfloat16)
    read, state = problem.scan()
    assert read.dtype == torch.bfloat16 and state.current.dtype == torch.float32
    exact, _ = problem.cast(torch.float32).scan()
    assert torch.equal(read, exact.bfloat16())
