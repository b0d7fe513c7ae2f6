"""One token of every row by the recurrence, and rows of different lengths through the scan."""

from __future__ import annotations

import pytest
import torch
from ops.problems import MODES, Problem
from torch import Tensor

from nlscale.ops.memory.rules import MemoryState
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.memory.step import MemoryStep, advance

every_mode = pytest.mark.parametrize("mode", MODES)
ROWS, LENGTH, CHUNK = 3, 11, 4


def problem_of(mode: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(5)
    return Problem(mode, LENGTH, batch=ROWS, chunk=CHUNK).cast(torch.float32).cast(dtype)


def empty(problem: Problem) -> MemoryState:
    """Before the first token, in memory of its own."""
    nothing = [x[:, :, :0] for x in problem.inputs()]
    _, state = memory_scan(*nothing, problem.weights(), problem.rules)
    return MemoryState(
        None if state.start is None else state.start.clone(), state.current.clone(), state.position
    )


def stepped(problem: Problem, at: list[int], state: MemoryState, active: Tensor | None) -> Tensor:
    """The reads of the token at a place of each row, [batch, heads, d]."""
    a, b, q, eta, alpha = (
        torch.stack([x[i, :, t] for i, t in enumerate(at)]) for x in problem.inputs()
    )
    step = MemoryStep(problem.weights(), problem.rules, a.dtype)
    read = step(torch.stack([a, b], 2), q, torch.stack([eta, alpha], -1), state, active)
    advance(state, CHUNK, active)
    return read


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@every_mode
def test_rows_that_pause_read_what_the_recurrence_reads(
    mode: str, dtype: torch.dtype, bound: float
) -> None:
    """Each row through two chunk boundaries, at places of its own."""
    problem = problem_of(mode, dtype)
    want = problem.cast(torch.float64).reference()
    state, at, worst = empty(problem), [0] * ROWS, 0.0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        while min(at) < LENGTH:
            active = torch.rand(ROWS, generator=generator) < 0.6
            active &= torch.tensor(at) < LENGTH
            everyone = bool(active.all())
            read = stepped(
                problem, [min(t, LENGTH - 1) for t in at], state, None if everyone else active
            )
            for row in active.nonzero()[:, 0].tolist():
                error = (read[row].double() - want[row, :, at[row]]).norm()
                worst = max(worst, float(error / want[row, :, at[row]].norm()))
                at[row] += 1
            assert state.position.tolist() == [t % CHUNK for t in at]
    assert worst < bound, worst


@every_mode
def test_the_state_after_steps_is_that_of_the_scan(mode: str) -> None:
    problem = problem_of(mode, torch.float64)
    state = empty(problem)
    with torch.no_grad():
        _, want = problem.scan()
        for t in range(LENGTH):
            stepped(problem, [t] * ROWS, state, None)
    assert torch.equal(state.position, want.position)
    assert torch.allclose(state.current, want.current, rtol=0, atol=1e-13)
    if want.start is not None and state.start is not None:
        assert torch.allclose(state.start, want.start, rtol=0, atol=1e-13)
        assert not torch.allclose(state.start, state.current[:, :, :5], rtol=0, atol=1e-3)


@every_mode
def test_a_row_that_reads_nothing_stays_bit_for_bit(mode: str) -> None:
    problem = problem_of(mode, torch.float32)
    with torch.no_grad():
        _, state = problem.scan()
        state.current = state.current.contiguous().clone()
        before = state.current.clone(), state.position.clone()
        active = torch.tensor([True, False, True])
        stepped(problem, [0] * ROWS, state, active)
        _, after = memory_scan(
            *problem.inputs(), problem.weights(), problem.rules, state,
            lengths=torch.tensor([6, 0, 11]),
        )  # fmt: skip
    for got in (state, after):
        assert torch.equal(got.current[1].view(torch.int32), before[0][1].view(torch.int32))
        assert got.position[1] == before[1][1]
        assert not torch.equal(got.current[0], before[0][0])


@every_mode
def test_rows_of_any_lengths_in_one_scan_are_each_alone(mode: str) -> None:
    """Twice: from the start, and from where that has left each row in its chunk."""
    problem = problem_of(mode, torch.float64)
    cuts = [torch.tensor([7, 0, 4]), torch.tensor([1, 11, 7])]  # within, at and over the ends
    alone: list[MemoryState | None] = [None] * ROWS
    state, begin = None, [0] * ROWS
    with torch.no_grad():
        for lengths in cuts:
            pieces = [
                torch.stack([x[i].roll(-t, 1) for i, t in enumerate(begin)])
                for x in problem.inputs()
            ]
            read, state = memory_scan(
                *pieces, problem.weights(), problem.rules, state, lengths=lengths
            )
            for i, n in enumerate(lengths.tolist()):
                piece = [x[i : i + 1, :, :n] for x in pieces]
                want, alone[i] = memory_scan(*piece, problem.weights(), problem.rules, alone[i])
                own = alone[i]
                assert own is not None
                assert torch.allclose(read[i, :, :n], want[0], rtol=0, atol=1e-13)
                assert torch.allclose(state.current[i], own.current[0], rtol=0, atol=1e-13)
                assert state.position[i] == own.position[0]
                if state.start is not None and own.start is not None:
                    assert torch.allclose(state.start[i], own.start[0], rtol=0, atol=1e-13)
                begin[i] += n


def test_a_ragged_prefill_is_two_runs_however_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from nlscale.ops.memory import scan

    runs = []
    plain = scan._torch_run

    def counted(sizes: tuple[int, int], *rest: object) -> tuple[Tensor, Tensor]:
        runs.append(sizes)
        return plain(sizes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scan, "_torch_run", counted)
    problem = Problem("hope", 30, batch=9, chunk=CHUNK)
    lengths = torch.tensor([30, 1, 2, 3, 4, 5, 17, 0, 29])
    memory_scan(*problem.inputs(), problem.weights(), problem.rules, lengths=lengths)
    assert runs == [(7, CHUNK), (1, 3)]
