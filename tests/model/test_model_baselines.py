"""The baselines beside Hope, each against a formula of its own; in pieces, and by documents."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from model.conftest import VOCABULARY, tiny
from torch import Tensor

from nlscale.errors import UserError
from nlscale.model.mixers.table import mixer as mixer_of
from nlscale.model.one_token import DecoderOneToken
from nlscale.ops.documents import Documents
from nlscale.plan.checks import check_sizes

WINDOW = 5
KEYS = {
    "deltanet": [],
    "retnet": [],
    "linear-attention": [],
    "sliding-window": [f"model.attention.window={WINDOW}", "model.attention.kv_heads=1"],
}
BASELINES = pytest.mark.parametrize("name", KEYS)
HEADS, D = 2, 16


def model_of(build, name: str):
    return build(f"model.mixer={name}", *KEYS[name]).double()


def of_memory(mixer, x: Tensor, name: str) -> Tensor:
    """x [time, batch, d_model]; one row and head after the other, with loops over tokens."""
    width, gates = HEADS * D, {"deltanet": 1, "retnet": 0, "linear-attention": 1}[name]
    sections = [width] * 4 + [HEADS] * gates
    rows = []
    for row in (x @ mixer.project.weight.T).unbind(1):
        a, b, q, gate, *logit = row.split(sections, -1)
        padded = F.pad(torch.cat([a, b], -1), (0, 0, 3, 0))
        window = torch.stack([padded[i : i + len(row)] for i in range(4)])
        a, b = F.silu((window * mixer.convolution[:, None]).sum(0)).split(width, -1)
        heads = []
        for h in range(HEADS):
            own = slice(h * D, (h + 1) * D)
            unit = a[:, own] / torch.sqrt(a[:, own].square().mean(-1, keepdim=True) + 1e-6)
            k = unit / torch.sqrt(unit.square().sum(-1, keepdim=True) + 1e-6)
            query = q[:, own] / torch.sqrt(q[:, own].square().sum(-1, keepdim=True) + 1e-6)
            read = READ[name](mixer, h, k, b[:, own], query, logit)
            read = read / torch.sqrt(read.square().mean(-1, keepdim=True) + 1e-6)
            heads.append(read * mixer.read_norm[h] * F.silu(gate[:, own]))
        rows.append(torch.cat(heads, -1) @ mixer.output.weight.T)
    return torch.stack(rows, 1)


def delta(mixer, h: int, k: Tensor, v: Tensor, q: Tensor, logit: list[Tensor]) -> Tensor:
    """Yang et al. 2024: S (I - beta k k^T) + beta v k^T."""
    beta = torch.sigmoid(logit[0][:, h] + mixer.eta_bias[h])
    state, reads = torch.zeros(D, D, dtype=k.dtype), []
    for t in range(len(k)):
        state = state - beta[t] * torch.outer(state @ k[t] - v[t], k[t])
        reads.append(state @ q[t])
    return torch.stack(reads)


def retention(mixer, h: int, k: Tensor, v: Tensor, q: Tensor, logit: list[Tensor]) -> Tensor:
    """Sun et al. 2023, the parallel form: (Q K^T * gamma^(i - j)) V."""
    time = torch.arange(len(k), dtype=k.dtype)
    decay = (1 - 2.0 ** (-5 - h)) ** (time[:, None] - time)
    return (q @ k.T * decay).tril() @ v


def scalar_decay(mixer, h: int, k: Tensor, v: Tensor, q: Tensor, logit: list[Tensor]) -> Tensor:
    """What token j wrote has been multiplied by the decays of all after it."""
    alpha = torch.sigmoid(logit[0][:, h] + mixer.alpha_bias[h])
    reads = []
    for i in range(len(k)):
        left = torch.stack([alpha[j + 1 : i + 1].prod() for j in range(i + 1)])
        reads.append((left * (k[: i + 1] @ q[i])) @ v[: i + 1])
    return torch.stack(reads)


READ = {"deltanet": delta, "retnet": retention, "linear-attention": scalar_decay}


def of_window(mixer, x: Tensor, name: str) -> Tensor:
    """All pairs, with the rotation as complex numbers."""
    time, angles = len(x), D // 2
    q, k, v = (x @ mixer.project.weight.T).split([HEADS * D, D, D], -1)
    rate = 10000.0 ** (-torch.arange(angles, dtype=x.dtype) / angles)
    turn = torch.polar(torch.ones(time, angles, dtype=x.dtype), torch.arange(time)[:, None] * rate)[
        :, None
    ]

    def rotated(y: Tensor) -> Tensor:
        return torch.view_as_complex(torch.stack(y.chunk(2, -1), -1)) * turn

    reads = []
    for h in range(HEADS):
        own = slice(h * D, (h + 1) * D)
        pairs = torch.einsum("ibd,jbd->bij", rotated(q[..., own]), rotated(k).conj()).real
        distance = torch.arange(time)[:, None] - torch.arange(time)
        unseen = (distance < 0) | (distance >= WINDOW)
        weight = torch.softmax((pairs / math.sqrt(D)).masked_fill(unseen, -math.inf), -1)
        reads.append(torch.einsum("bij,jbd->ibd", weight, v))
    return torch.cat(reads, -1) @ mixer.output.weight.T


@BASELINES
@pytest.mark.parametrize("time", [3, 26])
def test_it_computes_its_formula_with_every_gradient(build, name: str, time: int) -> None:
    mixer = model_of(build, name).blocks["0"].mixer
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in mixer.parameters():  # at the start some are alike, or nothing
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    x = torch.randn(time, 2, HEADS * D, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leaves = [x.requires_grad_(), *mixer.parameters()]
    formula = of_window if name == "sliding-window" else of_memory
    outs = mixer(x)[0], formula(mixer, x, name)
    assert torch.allclose(*outs, rtol=1e-9, atol=1e-11)
    found, wanted = (torch.autograd.grad((out * weight).sum(), leaves) for out in outs)
    for one, other in zip(found, wanted, strict=True):
        assert bool(other.abs().max() > 0)
        assert (one - other).norm() <= 1e-9 * other.norm()


@BASELINES
def test_pieces_and_tokens_are_the_whole(build, tokens, name: str) -> None:
    model = model_of(build, name)
    with torch.no_grad():
        whole = model.hidden(tokens)[0]
        pieces, states = [], None
        for piece in tokens.split([3, 9, 1, 1, 6, 6], dim=1):
            out, states = model.hidden(piece, states)
            pieces.append(out)
        assert torch.allclose(torch.cat(pieces), whole, rtol=0, atol=1e-12)
        _, states = model.hidden(tokens[:, :7], lengths=torch.tensor([7, 2, 4]))
        step, read = DecoderOneToken(model), torch.tensor([7, 2, 4])
        for turn in range(9):
            active = None if turn % 3 else torch.tensor([turn != 3, True, turn != 6])
            given = tokens[torch.arange(3), read]
            logits = step.logits(given, states, active)
            step.advance(states, active)
            read = read + (1 if active is None else active)
        last = torch.stack([whole[n - 1, row] for row, n in enumerate(read)])
        assert torch.allclose(logits, F.linear(model.norm(last), model.head.weight), atol=1e-12)


@BASELINES
def test_documents_of_a_row_are_each_alone(build, name: str) -> None:
    tokens = torch.randint(VOCABULARY - 1, (2, 25), generator=torch.Generator().manual_seed(3))
    tokens[0, [9, 14]] = VOCABULARY - 1
    model = model_of(build, name)
    where = Documents.of(tokens[:, :-1].numpy(), VOCABULARY - 1, 4, torch.device("cpu"))
    found = model(tokens[:, :-1], tokens[:, 1:], where)
    alone = torch.cat(
        [model(tokens[:1, a:b], tokens[:1, a + 1 : b + 1]) for a, b in ((0, 9), (9, 14), (14, 24))]
    )
    other = model(tokens[1:, :-1], tokens[1:, 1:])
    wanted = torch.cat([alone, other], 1)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(x.sum(), [*model.parameters()]) for x in (found, wanted)]
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-8, atol=1e-10)


@BASELINES
def test_in_plain_torch_it_is_the_same(build, name: str) -> None:
    """What exports to Hugging Face carry: rows of different lengths, in pieces and tokens."""
    config = tiny(f"model.mixer={name}", *KEYS[name])
    facts, mixer = mixer_of(name), model_of(build, name).blocks["0"].mixer
    options = facts.plain_options(config.model)
    plain = facts.plain()(HEADS * D, config.model.norm_eps, **options).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if v is not None})
    generator = torch.Generator().manual_seed(4)
    states: list = [None, None]
    with torch.no_grad():
        for read in ([13, 9], [1, 1], [1, 0], [6, 2]):
            lengths = torch.tensor(read)
            x = torch.randn(2, max(read), HEADS * D, generator=generator, dtype=torch.float64)
            ours, states[0] = mixer(x.transpose(0, 1), states[0], None, lengths)
            theirs, states[1] = plain(x, states[1], lengths)
            for row, length in enumerate(read):
                one, other = ours[:length, row], theirs[row, :length]
                assert torch.allclose(one, other, rtol=0, atol=1e-12)
    if name == "sliding-window":
        assert states[1]["keys"].shape[2] < 13


def test_what_a_window_carries_does_not_grow(build, tokens) -> None:
    model = model_of(build, "sliding-window")
    sizes = set()
    with torch.no_grad():
        _, states = model.hidden(tokens[:, :2])
        for t in range(2, 20):
            _, states = model.hidden(tokens[:, t : t + 1], states)
            sizes.add(sum(x.numel() for x in states["0"].tensors().values()))
    assert sizes == {2 * 3 * 1 * (WINDOW - 1) * D + 3}


def test_what_says_nothing_of_a_mixer_is_refused() -> None:
    def refused(*keys: str) -> str:
        with pytest.raises(UserError) as error:
            check_sizes(tiny(*keys), 1)
        return str(error.value)

    assert "erases nothing" in refused("model.mixer=retnet", "model.memory.write=decayed")
    serial = refused("model.mixer=deltanet", "model.memory.gain=kalman")
    assert "model.memory.gain" in serial and "use hope or gated-delta" in serial
    window = refused("model.mixer=attention", "model.attention.window=8")
    assert "model.mixer=sliding-window" in window
    check_sizes(tiny("model.mixer=sliding-window", "model.attention.window=8"), 1)
