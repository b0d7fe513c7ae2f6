"""The mixers with a memory in plain torch: `nlscale.model.mixers.memory.module`, to be read.

One code path (docs/concepts/memory.md): chunks of tokens by a few products each, differentiated by
autograd, and one token at a time by the recurrence itself. Rows may be anywhere in their chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlscale.model.plain import PlainLinear, PlainMixer, State, wide


class PlainMemory(PlainMixer):
    """A memory of one state a head and row.

    a, b  = SiLU(convolution(W_a x)), SiLU(convolution(W_b x))     inputs of k and of v
    q     = normalize(W_q x)                                       static queries
    y     = W_o ( RMSNorm(read) * SiLU(W_g x) )                    each if configured

    The queries may go through the convolution and SiLU too, and the gate be a sigmoid.

    Its state, fp32 but for the tail:
        tail      the last inputs of the convolution, [batch, window - 1, channels]
        pi, main  the transfer matrix Pi and the main memory S, [batch, heads, d, d], where there is
                  one
        start     Pi at the start of the current chunk
        position  tokens of the current chunk that are written, int64 [batch]
    """

    eta_bias: nn.Parameter
    alpha_bias: nn.Parameter
    read_norm: nn.Parameter | None
    memory_key: nn.Parameter
    memory_value: nn.Parameter
    memory_gates: nn.Parameter
    memory_read: nn.Parameter
    lambda_key: nn.Parameter
    lambda_value: nn.Parameter

    def __init__(
        self,
        d_model: int,
        norm_eps: float,
        *,
        heads: int,
        chunk: int,
        convolution: int,
        query_convolution: bool = False,
        write: str = "undecayed",
        strength: int = 1,
        gate_activation: str = "silu",
        modifies_itself: bool,
        main_memory: bool,
        erases: bool = True,
        decay: str = "learned",
        anchored: bool,
        c: float,
        normalize_value: bool,
        separate_inputs: bool,
        static_gates: bool,
        output_gate: bool,
        read_norm: bool,
        lambda_init: float,
        eta_bias: float,
        alpha_bias: float,
    ) -> None:
        super().__init__()
        d = d_model // heads
        self.heads, self.head_dim, self.norm_eps, self.chunk = heads, d, norm_eps, chunk
        self.inputs, self.gated, self.static_gates = 1 + separate_inputs, output_gate, static_gates
        self.modifies_itself, self.main_memory = modifies_itself, main_memory
        self.anchored, self.c, self.normalize_value = anchored, c, normalize_value
        self.decayed_write, self.strength = write == "decayed", strength
        self.activation = torch.sigmoid if gate_activation == "sigmoid" else F.silu
        self.starts = lambda_init, eta_bias, alpha_bias
        self.convolved = self.inputs + query_convolution
        self.sizes = [self.convolved * d_model, d_model * (not query_convolution)]
        self.sizes.append(d_model * output_gate)
        learned = {"eta": erases, "alpha": decay == "learned"}
        self.gates, self.erases, self.decay = [g for g in learned if learned[g]], erases, decay
        self.sizes.append(len(self.gates) * heads * static_gates)
        self.project = PlainLinear(d_model, sum(self.sizes))
        self.output = PlainLinear(d_model, d_model, into_residual=True)
        self.convolution = nn.Parameter(torch.empty(convolution, self.convolved * d_model))
        for gate in self.gates:
            self.register_parameter(f"{gate}_bias", nn.Parameter(torch.empty(heads)))
        own: dict[str, tuple[int, ...]] = {}
        if read_norm:
            own["read_norm"] = (heads, d)
        if modifies_itself:
            own |= {"memory_key": (heads, d, d), "memory_value": (heads, d, d)}
            own["memory_gates"] = (heads, 2, d)
            if main_memory:
                own |= {"lambda_key": (heads,), "lambda_value": (heads,)}
            else:
                own["memory_read"] = (heads, d, d)
        for name, shape in own.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if not read_norm:
            self.register_parameter("read_norm", None)

    def forward(self, x: Tensor, state: State | None, lengths: Tensor) -> tuple[Tensor, State]:
        projected = self.project(x)
        fed, q, gate, static = projected.split(self.sizes, dim=-1)
        if state is None:
            state = self._begin(fed)
        fed, tail = self._convolve(fed, state["tail"], lengths)
        a, *b = (self._by_head(part) for part in fed.chunk(self.convolved, dim=-1))
        q = b.pop() if self.convolved > self.inputs else self._by_head(q)
        eta, alpha = self._gate_logits(static)
        unit = wide(a) * torch.rsqrt(wide(a).square().mean(-1, True) + self.norm_eps)
        q = normalize(q)
        inputs = (wide(unit.to(a.dtype)), wide(b[0] if b else a), wide(q), eta, alpha)
        if x.shape[1] == 1:
            read, after = self._token(*inputs, state, lengths)
        else:
            read, after = self._chunks(*inputs, state, lengths)
        if not self.main_memory:
            read = read @ wide(self.memory_read).mT
        read = read.to(projected.dtype)
        if self.read_norm is not None:
            read = F.rms_norm(read, read.shape[-1:], None, self.norm_eps) * self.read_norm[:, None]
        read = read.transpose(1, 2).flatten(2).to(projected.dtype)
        if self.gated:
            read = read * self.activation(gate)
        return self.output(read), {**after, "tail": tail}

    def _begin(self, fed: Tensor) -> State:
        """At the start of a sequence: Pi is the identity, S is zero."""
        batch, h, d = len(fed), self.heads, self.head_dim
        zeros = wide(fed.new_zeros(batch, h, d, d))
        state = {
            "tail": fed.new_zeros(batch, len(self.convolution) - 1, fed.shape[-1]),
            "position": torch.zeros(batch, dtype=torch.int64, device=fed.device),
        }
        if self.main_memory:
            state["main"] = zeros
        if self.modifies_itself:
            state["pi"] = state["start"] = zeros + torch.eye(
                d, device=fed.device, dtype=zeros.dtype
            )
        return state

    def _convolve(self, fed: Tensor, tail: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of a causal depthwise convolution, and its last inputs of each row."""
        padded, time = torch.cat([tail, fed], 1), fed.shape[1]
        mixed = torch.zeros_like(fed)
        for i, row in enumerate(self.convolution):
            mixed = mixed + padded[:, i : i + time] * row
        last = lengths[:, None] + torch.arange(tail.shape[1], device=fed.device)
        return F.silu(mixed), padded.take_along_dim(last[..., None], 1)

    def _by_head(self, x: Tensor) -> Tensor:
        """[batch, time, heads * d] -> [batch, heads, time, d]."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def _gate_logits(self, static: Tensor) -> tuple[Tensor, Tensor]:
        """Static logits of the write strength and of the decay, [batch, heads, time]."""
        # of a gate that is not learned, a logit: open, or a decay of 1 - 2^(-5 - head)
        fixed = wide(static.new_full((self.heads,), 1e4))
        biases = {"eta": fixed, "alpha": fixed}
        if self.decay == "fixed":
            head = torch.arange(self.heads, dtype=fixed.dtype, device=fixed.device)
            biases["alpha"] = torch.log(2 ** (5 + head) - 1)
        biases |= {gate: wide(getattr(self, f"{gate}_bias")) for gate in self.gates}
        shape = (len(static), self.heads, static.shape[1])
        logits = {gate: bias[:, None].expand(shape) for gate, bias in biases.items()}
        if self.static_gates and self.gates:
            from_x = wide(static).transpose(1, 2).chunk(len(self.gates), dim=1)
            for gate, given in zip(self.gates, from_x, strict=True):
                logits[gate] = given + logits[gate]
        return logits["eta"], logits["alpha"]

    def _made(
        self, a: Tensor, b: Tensor, eta: Tensor, alpha: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v and the logits of the gates, of tokens whose chunk began at Pi = `start`."""
        if start is None:
            return normalize(a), b, eta, alpha
        key, value = wide(self.memory_key), wide(self.memory_value)
        k, v = a, b
        if self.main_memory:
            key = wide(self.lambda_key)[:, None, None] * key
            value = wide(self.lambda_value)[:, None, None] * value
        else:
            k, v = torch.zeros_like(a), torch.zeros_like(b)
        k, v = k + a @ (key @ start).mT, v + b @ (value @ start).mT
        from_memory = a @ (wide(self.memory_gates) @ start).mT
        return normalize(k), v, eta + from_memory[..., 0], alpha + from_memory[..., 1]

    def _target(self, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        """Pi_s (u - c k): what Pi is to hold at k."""
        u = normalize(v) if self.normalize_value else v
        return (u - self.c * k) @ start.mT

    def _token(
        self,
        a: Tensor,
        b: Tensor,
        q: Tensor,
        eta: Tensor,
        alpha: Tensor,
        state: State,
        lengths: Tensor,
    ) -> tuple[Tensor, State]:
        """One token of each row whose length is 1, by the recurrence.

        Pi = alpha Pi + (1 - alpha) I + eta ( Pi_s (u - c k) - Pi k ) k^T       (anchored)
        S  = alpha S + eta ( v - S k ) k^T

        or, of decayed writes, with alpha Pi + (1 - alpha) I and alpha S in the place of Pi and S.
        """
        reads, after, main = (lengths > 0)[:, None, None, None], dict(state), state.get("main")
        k, v, eta, alpha = self._made(a, b, eta, alpha, state.get("start"))
        r = torch.where(reads, self.strength * torch.sigmoid(eta)[..., None], 0.0)
        keep = torch.where(reads, torch.sigmoid(alpha)[..., None], 1.0)
        after["position"] = (state["position"] + lengths) % self.chunk
        if self.modifies_itself:
            pi, start = state["pi"], state["start"]
            decayed = keep * pi
            if self.anchored:
                eye = torch.eye(self.head_dim, dtype=pi.dtype, device=pi.device)
                decayed = decayed + (1 - keep) * eye
            erased = decayed if self.decayed_write else pi
            pi = decayed + (r * (self._target(k, v, start) - k @ erased.mT)).mT @ k
            ends = reads & (after["position"] == 0)[:, None, None, None]
            after |= {"pi": pi, "start": torch.where(ends, pi, start)}
        if main is not None:
            erased = keep * main if self.decayed_write else main
            erased = erased * self.erases
            after["main"] = keep * main + (r * (v - k @ erased.mT)).mT @ k
        return q @ after["main" if self.main_memory else "pi"].mT, after

    def _chunks(
        self,
        a: Tensor,
        b: Tensor,
        q: Tensor,
        eta: Tensor,
        alpha: Tensor,
        state: State,
        lengths: Tensor,
    ) -> tuple[Tensor, State]:
        """Any number of tokens. Each row is laid out from where it stands in its chunk, so that
        the chunks of all rows are the same places; where none of its tokens stands nothing is
        written and nothing decays."""
        before, after = state["position"], dict(state)
        end, time = before + lengths, a.shape[2]
        places = max(int(end.max()), 1)
        if places > self.chunk:
            places += -places % self.chunk
        index = torch.arange(places, device=a.device) - before[:, None]
        stands = ((index >= 0) & (index < lengths[:, None]))[:, None]
        index = index.clamp(0, time - 1)[:, None]
        a, b, q = (x.take_along_dim(index[..., None], 2) for x in (a, b, q))
        eta, alpha = (x.take_along_dim(index, 2) for x in (eta, alpha))
        reads = []
        for first in range(0, places, self.chunk):
            part = slice(first, first + self.chunk)
            chunk = [x[:, :, part] for x in (a, b, q, eta, alpha, stands)]
            read, after = self._chunk(chunk, after)
            reads.append(read)
            if self.modifies_itself:
                over = (end >= first + self.chunk)[:, None, None, None]
                after["start"] = torch.where(over, after["pi"], after["start"])
        after["position"] = end % self.chunk
        back = (before[:, None] + torch.arange(time, device=a.device)).clamp(max=places - 1)
        return torch.cat(reads, 2).take_along_dim(back[:, None, :, None], 2), after

    def _chunk(self, tokens: list[Tensor], state: State) -> tuple[Tensor, State]:
        """The tokens of one chunk: what they read, [batch, heads, tokens, d], and the state after.

        With g_i the log of the decay up to token i, F_ij = exp(g_i - g_j), Z a memory before:

            D_i = r_i ( X_i - sum_{j<i} F_{i-1,j} (k_j . k_i) D_j )        one triangular system
            X_i = v_i - exp(g_{i-1}) S k_i,   or for Pi   Pi_s (u_i - c k_i) - Pi_{i-1} k_i
            Z_i = exp(g_i) Z + sum_{j<=i} F_ij D_j k_j^T [ + (1 - exp(g_i)) I ]

        Of decayed writes the sums and X have g_i and F_ij in the place of g_{i-1} and F_{i-1,j}.
        """
        a, b, q, eta, alpha, stands = tokens
        k, v, eta, alpha = self._made(a, b, eta, alpha, state.get("start"))
        r = torch.where(stands, self.strength * torch.sigmoid(eta), 0.0)[..., None]
        log_decay = torch.where(stands, F.logsigmoid(alpha), 0.0)
        g = log_decay.cumsum(-1)
        before = g if self.decayed_write else g - log_decay
        decayed, decayed_before = torch.exp(g)[..., None], torch.exp(before)[..., None]
        # what lies above the diagonal is masked before exp, where it may overflow
        left = torch.exp(_below(g[..., :, None] - g[..., None, :], 0))
        left_before = torch.exp(_below(before[..., :, None] - g[..., None, :], -1))
        coupling, scores = r * left_before * (k @ k.mT) * self.erases, left * (q @ k.mT)
        end = left[..., -1, :, None] * k  # F_Cj k_j
        whole = decayed[..., -1:, :]  # exp(g_C)

        def write(x: Tensor) -> Tensor:
            return torch.linalg.solve_triangular(coupling, r * x, upper=False, unitriangular=True)

        after = dict(state)
        if self.modifies_itself:
            x = self._target(k, v, state["start"]) - decayed_before * (k @ state["pi"].mT)
            if self.anchored:
                x = x - (1 - decayed_before) * k
            written = write(x)
            after["pi"] = whole * state["pi"] + written.mT @ end
            read = decayed * (q @ state["pi"].mT) + scores @ written
            if self.anchored:
                eye = torch.eye(self.head_dim, dtype=q.dtype, device=q.device)
                after["pi"] = after["pi"] + (1 - whole) * eye
                read = read + (1 - decayed) * q
        if self.main_memory:
            written = write(v - self.erases * decayed_before * (k @ state["main"].mT))
            after["main"] = whole * state["main"] + written.mT @ end
            read = decayed * (q @ state["main"].mT) + scores @ written
        return read, after

    def initialize(self, std: float, residual_std: float) -> None:
        lambda_init, eta_bias, alpha_bias = self.starts
        nn.init.normal_(self.convolution, std=len(self.convolution) ** -0.5)
        if "eta" in self.gates:
            nn.init.constant_(self.eta_bias, eta_bias)
        if "alpha" in self.gates:
            with torch.no_grad():
                spread = torch.linspace(-1, 1, self.heads, device=self.alpha_bias.device)
                self.alpha_bias.copy_(alpha_bias + spread)  # memories of different reach
        if self.read_norm is not None:
            nn.init.ones_(self.read_norm)
        if not self.modifies_itself:
            return
        nn.init.normal_(self.memory_gates, std=0.02)
        memories = [self.memory_key, self.memory_value]
        if self.main_memory:
            nn.init.constant_(self.lambda_key, lambda_init)
            nn.init.constant_(self.lambda_value, lambda_init)
        else:
            memories.append(self.memory_read)
        for memory in memories:
            for head in memory.unbind():
                nn.init.orthogonal_(head)


def normalize(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6) along the last dimension."""
    x_wide = wide(x)
    return (x_wide * torch.rsqrt(x_wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _below(x: Tensor, diagonal: int) -> Tensor:
    """-inf above that diagonal."""
    size = x.shape[-1]
    kept = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(diagonal)
    return x.masked_fill(~kept, float("-inf"))
