"""The ways to write that are off by default, against the recurrence, token by token in float64."""

from __future__ import annotations

import random

import pytest
import torch
from ops.problems import Problem, assert_same, conditions, relative_errors

from nlscale.ops.memory.rules import MemoryState
from nlscale.ops.memory.scan import memory_scan
from nlscale.ops.memory.step import MemoryStep, advance

Rules = dict[str, bool | float]
WRITES: dict[str, Rules] = {
    "decayed": {"decayed_write": True},
    "twice as strong": {"decayed_write": True, "strength": 2.0},
}
ADDS: Rules = {"erases": False}
SERIAL: dict[str, Rules] = {
    "reads state": {"reads_state": True},
    "kalman": {"kalman_gain": True},
    "momentum": {"chunk_momentum": True},
    "channels": {"channel_gates": True, "decayed_write": True},
    "all": {
        "reads_state": True, "kalman_gain": True, "chunk_momentum": True,
        "decayed_write": True, "strength": 2.0,
    },
}  # fmt: skip
ALL = WRITES | SERIAL
STATES = ("current", "start", "main_start", "uncertainty", "momentum", "since")
ROUNDINGS = 500
"""As in test_ops_memory_scan."""

SOME = [(kind, "gated-delta") for kind in ALL] + [
    (kind, "hope") for kind in ("decayed", "all", "channels")
]
every_write = pytest.mark.parametrize(("kind", "mode"), SOME)
every_serial = pytest.mark.parametrize("kind", SERIAL)


def compare(problem: Problem) -> None:
    """In fp32 and in float64, of the same inputs."""
    exact = problem.cast(torch.float32).cast(torch.float64)
    read = exact.reference()
    weight = torch.randn_like(read)
    want = {"read": read, **exact.gradients((read * weight).sum())}
    magnified = conditions(exact, want, weight)
    for dtype in (torch.float64, torch.float32):
        given = exact.cast(dtype)
        read, _ = given.scan()
        assert read.dtype == dtype
        got = {"read": read, **given.gradients((read * weight.to(dtype)).sum())}
        for name, error in relative_errors(got, want).items():
            bound = ROUNDINGS * torch.finfo(dtype).eps / 2 * (1 + magnified[name])
            assert error <= bound, f"{name}, {dtype}: relative error {error:.1e} > {bound:.1e}"


@every_write
def test_reads_and_gradients_are_those_of_the_recurrence(kind: str, mode: str, seed: int) -> None:
    compare(Problem(mode, 10, batch=1, **ALL[kind]))


@pytest.mark.parametrize("kind", ["twice as strong", "all", "channels"])
def test_keys_that_are_nearly_equal_are_as_accurate(kind: str, seed: int) -> None:
    compare(Problem("gated-delta", 10, "correlated keys", batch=1, **ALL[kind]))


@pytest.mark.parametrize("case", ["", "correlated keys", "no decay", "strong decay"])
def test_writes_that_erase_nothing_are_those_of_the_recurrence(case: str, seed: int) -> None:
    compare(Problem("gated-delta", 10, case, batch=1, **ADDS))


@pytest.mark.parametrize("mode", ["gated-delta", "hope"])
@pytest.mark.parametrize("case", ["strong decay", "no decay"])
def test_gates_of_channels_at_their_ends_are_as_accurate(case: str, mode: str, seed: int) -> None:
    """In chunks that are no power of two, and with all else that they go together with."""
    with_them: Rules = {"reads_state": True, "chunk_momentum": True, "strength": 2.0}
    compare(Problem(mode, 10, case, batch=1, chunk=7, **SERIAL["channels"], **with_them))


@pytest.mark.parametrize("mode", ["gated-delta", "hope"])
def test_gates_of_channels_that_are_all_equal_are_those_of_the_head(mode: str, seed: int) -> None:
    """And the derivative by the gate of a head is the sum of those by its channels."""
    of_head = Problem(mode, 11, **WRITES["decayed"])
    channels = Problem(mode, 1, **SERIAL["channels"]).rules
    d, given, gates = 5, of_head.inputs(), of_head.leaves.get("gates")
    weights = of_head.weights()
    if weights is not None and gates is not None:
        weights.gates = gates.repeat_interleave(torch.tensor([2 * d, d]), 1)
    eta, alpha = (
        x[..., None].expand(*x.shape, n) for x, n in zip(given[3:], (2 * d, d), strict=True)
    )
    found, after = memory_scan(*given[:3], eta, alpha, weights, channels, main=of_head.main())
    want, state = of_head.scan()
    by = torch.randn_like(want)
    losses = [(x * by).sum() for x in (found, want)]
    got, wanted = (of_head.gradients(loss) for loss in losses)
    assert_same({"read": found, "S": after.current, **got},
                {"read": want, "S": state.current, **wanted}, 1e-12)  # fmt: skip


def test_a_memory_read_off_pi_erases_what_has_decayed_toward_its_start(seed: int) -> None:
    compare(Problem("pure", 10, batch=1, **ALL["twice as strong"]))


def test_a_chunk_may_be_one_token(seed: int) -> None:
    compare(Problem("gated-delta", 5, batch=1, chunk=1, **SERIAL["all"]))


def states(state: MemoryState) -> dict[str, torch.Tensor]:
    return {name: x for name in STATES if (x := getattr(state, name)) is not None}


@every_write
def test_a_stream_in_random_pieces_is_the_whole(kind: str, mode: str, seed: int) -> None:
    problem = Problem(mode, 23, **ALL[kind])
    whole, end = problem.scan()
    reads, state, at = [], None, 0
    while at < 23:
        length = min(random.Random(seed + at).randint(1, 9), 23 - at)
        piece = [x[:, :, at : at + length] for x in problem.inputs()]
        read, state = memory_scan(
            *piece, problem.weights(), problem.rules, state, main=problem.main()
        )
        reads.append(read)
        at += length
    assert state is not None and torch.equal(state.position, end.position)
    pieces, want = {"read": torch.cat(reads, 2), **states(state)}, {"read": whole, **states(end)}
    assert pieces.keys() == want.keys()
    assert_same(pieces, want, 1e-12)
    weights = {k: torch.randn_like(v) for k, v in want.items()}
    losses = [sum((w * x[k]).sum() for k, w in weights.items()) for x in (pieces, want)]
    assert_same(problem.gradients(losses[0]), problem.gradients(losses[1]), 1e-11)


@every_serial
def test_rows_of_any_lengths_in_one_scan_are_each_alone(kind: str, seed: int) -> None:
    """Twice: from the start, and from where that has left each row in its chunk."""
    problem = Problem("hope", 11, batch=3, **SERIAL[kind])
    alone: list[MemoryState | None] = [None] * 3
    state = None
    with torch.no_grad():
        for lengths in (torch.tensor([7, 0, 4]), torch.tensor([1, 11, 7])):
            given = problem.inputs()
            read, state = memory_scan(
                *given, problem.weights(), problem.rules, state, lengths=lengths,
                main=problem.main(),
            )  # fmt: skip
            for i, n in enumerate(lengths.tolist()):
                want, own = memory_scan(
                    *(x[i : i + 1, :, :n] for x in given), problem.weights(), problem.rules,
                    alone[i], main=problem.main(),
                )  # fmt: skip
                alone[i] = own
                assert torch.allclose(read[i, :, :n], want[0], rtol=0, atol=1e-13)
                for name, x in states(own).items():
                    found = getattr(state, name)[i]
                    assert torch.allclose(found, x[0], rtol=0, atol=1e-13), name


@every_write
def test_documents_are_each_alone(kind: str, mode: str, seed: int) -> None:
    """Chunks before which a row starts anew, the last of a document filled up with zeros."""
    problem = Problem(mode, 20, batch=2, **ALL[kind])
    filling = torch.zeros(2, 1, 20, dtype=torch.bool)
    filling[0, :, 7], filling[1, :, 13:16] = True, True
    carried = torch.ones(2, 5)
    carried[:, 0] = carried[0, 2] = carried[1, 4] = 0
    filled = [x.masked_fill(filling if x.dim() == 3 else filling[..., None], 0)
              for x in problem.inputs()]  # fmt: skip
    weights, rules, main = problem.weights(), problem.rules, problem.main()
    together, _ = memory_scan(*filled, weights, rules, carried=carried, main=main)
    found, wanted = [], []
    for row, begin, end in ((0, 0, 7), (0, 8, 20), (1, 0, 13), (1, 16, 20)):
        document = [x[row : row + 1, :, begin:end] for x in problem.inputs()]
        wanted.append(memory_scan(*document, weights, rules, main=main)[0])
        found.append(together[row : row + 1, :, begin:end])
    by = [torch.randn_like(x) for x in wanted]
    got, want = (
        {"read": torch.cat(reads, 2),
         **problem.gradients(sum((x * w).sum() for x, w in zip(reads, by, strict=True)))}
        for reads in (found, wanted)
    )  # fmt: skip
    assert_same(got, want, 1e-11)


@pytest.mark.parametrize("mode", ["hope", "gated-delta", "pure"])
@pytest.mark.parametrize("kind", WRITES)
def test_token_by_token_it_reads_what_the_recurrence_reads(kind: str, mode: str, seed: int) -> None:
    problem = Problem(mode, 11, **WRITES[kind])
    want = problem.reference()
    with torch.no_grad():
        empty = [x[:, :, :0] for x in problem.inputs()]
        _, state = memory_scan(*empty, problem.weights(), problem.rules)
        start = None if state.start is None else state.start.clone()
        state = MemoryState(start, state.current.clone(), state.position)
        step = MemoryStep(problem.weights(), problem.rules, torch.float64)
        for t in range(11):
            a, b, q, eta, alpha = (x[:, :, t] for x in problem.inputs())
            read = step(torch.stack([a, b], 2), q, torch.stack([eta, alpha], -1), state, None)
            advance(state, 4, None)
            assert torch.allclose(read, want[:, :, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["reads state", "momentum"])
def test_at_weight_zero_it_is_the_static_rule_and_the_weight_learns(kind: str, seed: int) -> None:
    problem = Problem("gated-delta", 13, **SERIAL[kind])
    weight = "state_weight" if kind == "reads state" else "momentum_weight"
    with torch.no_grad():
        problem.leaves[weight].zero_()
    read, _ = problem.scan()
    static, _ = memory_scan(*problem.inputs(), None, Problem("gated-delta", 1).rules)
    assert torch.allclose(read, static, rtol=0, atol=1e-13)
    gradient = problem.gradients((read * torch.randn_like(read)).sum())[weight]
    assert bool((gradient.abs() > 1e-6).all())


def in_fp32(mode: str, kind: str) -> tuple[Problem, dict[str, torch.Tensor], torch.Tensor]:
    """2,048 tokens in chunks of 64, what is right of them, and the weights of the reads."""
    problem = Problem(mode, 2048, d=16, batch=1, dtype=torch.float32, chunk=64, **ALL[kind])
    with torch.no_grad():  # as far from 0 as training takes them
        for name in {"state_weight", "momentum_weight"} & problem.leaves.keys():
            problem.leaves[name].mul_(0.2)
    exact = problem.cast(torch.float64)
    weight = torch.randn(1, 2, 2048, 16, dtype=torch.float64)
    return problem, answers(exact, weight), weight


def answers(problem: Problem, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    read, _ = problem.scan()
    return {"read": read, **problem.gradients((read * weight.to(read.dtype)).sum())}


@pytest.mark.parametrize(
    ("mode", "kind"),
    # In hope some of them magnify each other's rounding (docs/concepts/memory.md).
    [("gated-delta", kind) for kind in ALL] + [("hope", kind) for kind in ALL if kind != "all"],
)
def test_float32_gradients_are_good_to_1e_5(mode: str, kind: str) -> None:
    """Of one draw, as what a draw magnifies has no bound: of 20, at most 5.5e-6."""
    torch.manual_seed(5)
    problem, want, weight = in_fp32(mode, kind)
    assert_same(answers(problem, weight), want, 1e-5)
