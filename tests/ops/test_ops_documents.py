"""Documents in a row against each document alone."""

from __future__ import annotations

import pytest
import torch
from ops.interpreter import Call
from ops.memory.kernels.test_ops_kernels_scan import BOUND, use
from ops.problems import MODES, Problem, assert_same

from nlscale.ops.documents import Documents
from nlscale.ops.memory.scan import memory_scan

SEPARATOR = 7
LENGTHS = [[5, 1, 11, 4], [21]]
"""Of the documents of each row; chunks are of 4."""


def rows(lengths: list[list[int]]) -> torch.Tensor:
    """Token ids of rows whose documents are that long."""
    tokens = torch.randint(SEPARATOR, (len(lengths), sum(lengths[0])))
    for row, each in zip(tokens, lengths, strict=True):
        row[torch.tensor(each).cumsum(0)[:-1]] = SEPARATOR
    return tokens


def documents(lengths: list[list[int]], chunk: int) -> Documents:
    return Documents.of(rows(lengths).numpy(), SEPARATOR, chunk, torch.device("cpu"))


def packed(problem: Problem, where: Documents) -> torch.Tensor:
    filled = [where.fill(x) for x in problem.inputs()]
    read, _ = memory_scan(*filled, problem.weights(), problem.rules, carried=where.carried)
    return where.take(read)


def compare(
    seed: int, mode: str, lengths: list[list[int]], dtype: torch.dtype, bound: float, **sizes: int
) -> None:
    """The reads of a row of documents and all gradients, and those of each document alone."""
    torch.manual_seed(seed)
    problem = Problem(mode, sum(lengths[0]), batch=len(lengths), dtype=dtype, **sizes)
    exact = problem.cast(torch.float64)
    read = packed(problem, documents(lengths, problem.rules.chunk))
    alone = []
    for i, each in enumerate(lengths):
        parts = zip(*(x[i : i + 1].split(each, 2) for x in exact.inputs()), strict=True)
        scans = (memory_scan(*part, exact.weights(), exact.rules) for part in parts)
        alone.append(torch.cat([scan[0] for scan in scans], 2))
    want = torch.cat(alone)
    weight = torch.randn_like(want)
    assert_same(
        {"read": read, **problem.gradients((read * weight.to(dtype)).sum())},
        {"read": want, **exact.gradients((want * weight).sum())},
        bound,
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_document_in_a_row_is_read_as_if_it_stood_alone(mode: str, seed: int) -> None:
    compare(seed, mode, LENGTHS, torch.float64, 1e-11)


def through_the_kernels(seed: int, mode: str) -> None:
    use(kernels=True)
    compare(seed, mode, [[21, 1, 16, 9], [47]], torch.float32, BOUND, d=16, chunk=16)


@pytest.mark.parametrize("mode", ["hope", "pure", "gated-delta"])
def test_also_by_the_kernels(mode: str, seed: int, interpreted: Call) -> None:
    interpreted(through_the_kernels, seed, mode)


def test_every_document_begins_a_chunk() -> None:
    where = documents(LENGTHS, 4)
    assert where.position[0].tolist() == [*range(5), 0, *range(11), *range(4)]
    assert where.place[0].tolist() == [*range(5), 8, *range(12, 23), *range(24, 28)]
    assert where.place[1].tolist() == [*range(21)]
    assert where.carried.tolist() == [[0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]]
    tokens = torch.arange(42.0).view(2, 1, 21)
    filled = where.fill(tokens)
    assert filled.shape == (2, 1, 28) and filled.sum() == tokens.sum()
    assert torch.equal(where.take(filled), tokens)


def test_a_row_may_begin_with_a_separator_and_hold_many() -> None:
    tokens = torch.full((1, 3), SEPARATOR)
    where = Documents.of(tokens.numpy(), SEPARATOR, 4, torch.device("cpu"))
    assert where.position.tolist() == [[0, 0, 0]] and where.place.tolist() == [[0, 4, 8]]


def test_attention_is_within_a_document_and_causal() -> None:
    attends = documents([[2, 3]], 4).attends()
    within = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()
    assert torch.equal(attends, within[None, None])


def test_what_fills_a_row_up_begins_no_documents() -> None:
    row = [1, 2, SEPARATOR, 3, SEPARATOR, SEPARATOR, 4, 5, *[SEPARATOR] * 6]
    tokens = torch.tensor([row, row])
    counts = torch.ones(2, len(row), dtype=torch.bool)
    counts[0, 8:] = False  # the target of the last token of a document counts: its separator
    where = Documents.of(tokens.numpy(), SEPARATOR, 4, torch.device("cpu"), counts.numpy())
    begins = [(where.position[i] == 0).nonzero().flatten().tolist() for i in range(2)]
    assert begins[0] == [0, 2, 4, 5, 8]
    assert begins[1] == [0, 2, 4, 5, *range(8, 14)], "each of what counts is as it was"
