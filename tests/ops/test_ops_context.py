"""Changes inside the context against a loop over tokens, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from nlscale.ops.context import Change, changed, changed_on
from nlscale.ops.documents import Documents

HIDDEN, OUT = 5, 3
CPU = torch.device("cpu")


def by_token(h: Tensor, v: Tensor, chunk: int, decay: float) -> Tensor:
    """Of one sequence, [time, ...]: each token reads what whole chunks before its own added."""
    change, opened, found = torch.zeros(OUT, HIDDEN).double(), 0.0, []
    for t in range(len(h)):
        if t and t % chunk == 0:
            change, opened = decay * change + opened / chunk, 0.0
        found.append(change @ h[t])
        opened = opened + torch.outer(v[t], h[t])
    return torch.stack(found)


def drawn(length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden units and targets that want a gradient, and one of what is made of them."""
    h, v = (torch.randn(length, batch, n).double().requires_grad_() for n in (HIDDEN, OUT))
    return h, v, torch.randn(length, batch, OUT).double()


def compare(got: Tensor, want: Tensor, of: tuple[Tensor, ...], d: Tensor) -> None:
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad((x * d).sum(), of) for x in (got, want))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)
        assert float(theirs.abs().max()) > 1e-3


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize(("length", "chunk"), [(24, 6), (23, 5), (9, 1)])
def test_the_scan_is_the_loop(length: int, chunk: int, decay: float) -> None:
    h, v, d = drawn(length, 2)
    want = torch.stack([by_token(h[:, i], v[:, i], chunk, decay) for i in range(2)], 1)
    compare(changed(h, v, chunk, decay), want, (h, v), d)


def test_within_the_first_chunk_nothing_changes() -> None:
    h, v, d = drawn(7, 2)
    y = changed(h, v, 7, 1.0)
    assert not y.any()
    assert not any(g.any() for g in torch.autograd.grad((y * d).sum(), (h, v)))


def test_each_document_begins_anew() -> None:
    rows = np.ones((2, 21), dtype=np.int64)
    rows[0, [4, 5, 14]] = 0
    rows[1, [13]] = 0
    documents = Documents.of(rows, 0, 8, CPU, others=[3]).in_chunks[3]
    h, v, d = drawn(21, 2)

    def row(i: int) -> Tensor:
        ends = [0, *np.flatnonzero(rows[i] == 0).tolist(), 21]
        pieces = [slice(a, b) for a, b in itertools.pairwise(ends)]
        return torch.cat([by_token(h[p, i], v[p, i], 3, 0.8) for p in pieces])

    compare(changed(h, v, 3, 0.8, documents), torch.stack([row(0), row(1)], 1), (h, v), d)


def test_pieces_that_end_anywhere_are_the_whole() -> None:
    """Rows of different lengths, too; what follows the length of a row changes nothing."""
    chunk, decay, batch, length = 4, 0.9, 3, 30
    h, v, _ = drawn(length, batch)
    h, v = h.detach(), v.detach()
    want = torch.stack([by_token(h[:, i], v[:, i], chunk, decay) for i in range(batch)], 1)
    generator = torch.Generator().manual_seed(1)
    state: Change | None = None
    at = torch.zeros(batch, dtype=torch.long)
    while int(at.min()) < length:
        size = int(torch.randint(1, 11, (), generator=generator))
        read = torch.minimum(torch.randint(0, size + 1, (batch,), generator=generator), length - at)
        piece = torch.full((2, size, batch, HIDDEN), torch.nan).double()
        for i in range(batch):
            own = slice(int(at[i]), int(at[i] + read[i]))
            piece[0, : int(read[i]), i], piece[1, : int(read[i]), i, :OUT] = h[own, i], v[own, i]
        piece = piece.nan_to_num(7.0)
        y, state = changed_on(piece[0], piece[1, ..., :OUT], chunk, decay, state, read)
        for i in range(batch):
            own = slice(int(at[i]), int(at[i] + read[i]))
            assert torch.allclose(y[: int(read[i]), i], want[own, i], rtol=1e-12, atol=1e-12)
        at = at + read
    assert state is not None and torch.equal(state.position, at % chunk)


def test_a_piece_with_a_state_is_differentiated_as_the_loop() -> None:
    chunk, decay = 4, 0.9
    h, v, d = drawn(25, 2)
    want = torch.stack([by_token(h[:, i], v[:, i], chunk, decay) for i in range(2)], 1)[6:]
    _, state = changed_on(h[:6], v[:6], chunk, decay, None, None)
    later = tuple(x.detach()[6:].requires_grad_() for x in (h, v))
    y, _ = changed_on(*later, chunk, decay, state, None)
    theirs = [g[6:] for g in torch.autograd.grad((want * d[6:]).sum(), (h, v))]
    ours = torch.autograd.grad((y * d[6:]).sum(), later)
    assert torch.allclose(y, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)
