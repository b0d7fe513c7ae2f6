"""The memory over whole chunks, or over the beginning of one, by Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlscale.ops.device import generation, on_device
from nlscale.ops.memory.kernels.inputs import inputs_backward_kernel
from nlscale.ops.memory.kernels.main import main_backward_kernel, main_kernel
from nlscale.ops.memory.kernels.pi import pi_backward_kernel, pi_kernel
from nlscale.ops.memory.kernels.reads import reads_backward_kernel, reads_kernel
from nlscale.ops.memory.kernels.sizes import COLUMNS, launches
from nlscale.ops.memory.kernels.writes import writes_backward_kernel, writes_kernel

if TYPE_CHECKING:
    from nlscale.ops.memory.rules import MemoryRules

_PROGRAMS = 512
"""About how many the sums over tokens are spread over: a few for each multiprocessor."""


class FusedScan(torch.autograd.Function):
    """What `nlscale.ops.memory.chunk.ChunkWrites` and `ChunkReads` compute, from a chunk's start.

    Inputs may be bf16 or fp32: operands of products have that precision, sums and states fp32. Of
    the forward pass only the states at the start of chunks are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        q: Tensor,
        eta: Tensor,
        alpha: Tensor,
        pi: Tensor | None,
        main: Tensor | None,
        carried: Tensor | None,
        for_key: Tensor | None,
        for_value: Tensor | None,
        for_gates: Tensor | None,
        additive: bool,
        rules: MemoryRules,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """
        Args:
            a, b, q: what feeds k and v, and the queries, [batch, heads, time, d].
            eta, alpha: static logits, fp32 [batch, heads, time].
            pi, main: Pi and S at the start, fp32 [batch, heads, d, d]; None where there is none.
            carried: 0 at chunks before which both start anew, as they are where a sequence begins,
                else 1, fp32 [batch, chunks]; None where they never do.
            for_key, for_value: what Pi makes x and v with, [heads, d, d]; None without Pi.
            for_gates: m_eta and m_alpha, [heads, 2, d].
            additive: whether a and b themselves are part of x and v.
            rules: see there; anchored, unless there is no Pi.

        Returns:
            The reads, like q, and Pi and S after the last token.
        """
        fed = _Fed(*(x.contiguous() for x in (a, b, eta, alpha)))
        makers = [
            x if x is None else x.to(a.dtype).contiguous() for x in (for_key, for_value, for_gates)
        ]
        q, carried = q.contiguous(), None if carried is None else carried.contiguous()
        scan = _Scan(a, pi is not None, main is not None, additive, rules)
        pi_states = main_states = last_pi = last_main = None
        with on_device(a):
            if pi is not None:
                pi = pi.contiguous()
                pi_states, last_pi = scan.states(a), torch.empty_like(pi)
                pi_kernel[scan.serial](
                    *fed, *makers, pi, carried, pi_states, last_pi, *scan.sizes, scan.heads,
                    **scan.tile("pi"), **scan.rule, ADDITIVE=additive,
                    DOCUMENTS=carried is not None,
                )  # fmt: skip
            made = scan.write(fed, makers, pi_states, None, for_backward=False)
            if main is not None:
                main = main.contiguous()
                main_states, last_main = scan.states(a), torch.empty_like(main)
                main_kernel[scan.by_columns](
                    made.key, made.write, made.from_state, made.alpha_logits,
                    main, carried, main_states, last_main, *scan.sizes, scan.heads,
                    **scan.tile("main"), COLUMNS=scan.columns, DOCUMENTS=carried is not None,
                )  # fmt: skip
            reads = torch.empty_like(q)
            reads_kernel[scan.parallel](
                q, made.key, made.write, made.alpha_logits,
                pi_states if main is None else main_states, reads,
                *scan.sizes, **scan.tile("reads"), MAIN=scan.main,
            )  # fmt: skip
        ctx.save_for_backward(*fed, q, *makers, pi_states, main_states, carried)
        ctx.scan = scan
        return reads, last_pi, last_main

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_reads: Tensor, d_last_pi: Tensor | None, d_last_main: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved, scan = ctx.saved_tensors, ctx.scan
        fed, q, makers = _Fed(*saved[:4]), saved[4], saved[5:8]
        pi_states, main_states, carried = saved[8:]
        a, b = fed.a, fed.b
        with on_device(a):
            made = scan.write(fed, makers, pi_states, main_states, for_backward=True)
            d_q, d_key, d_write = (torch.empty_like(a) for _ in range(3))
            d_state, d_decay = scan.states(a), scan.column(a)
            reads_backward_kernel[scan.parallel](
                q, made.key, made.write, made.solve, made.alpha_logits,
                pi_states if main_states is None else main_states, d_reads.contiguous(),
                d_q, d_key, d_write, d_state, d_decay,
                *scan.sizes, **scan.tile("reads_backward"), MAIN=scan.main,
            )  # fmt: skip
            pi_write, d_main, d_value, d_r = made.write, None, None, None
            if d_last_main is not None:
                d_last_main = d_last_main.contiguous()
                d_after, d_main = scan.states(a), torch.empty_like(d_last_main)
                main_backward_kernel[scan.by_columns](
                    made.key, made.from_state, made.alpha_logits, d_write, d_state,
                    d_last_main, carried, d_after, d_main, *scan.sizes, scan.heads,
                    **scan.tile("main_backward"), COLUMNS=scan.columns,
                    DOCUMENTS=carried is not None,
                )  # fmt: skip
                pi_write, d_value, d_r = made.pi_write, torch.empty_like(b), scan.column(a)
                writes_backward_kernel[scan.parallel](
                    made.key, made.key_scale, made.write, made.solve, main_states,
                    made.eta_logits, made.alpha_logits, d_write, d_after,
                    d_key, d_decay, d_value, d_r,
                    *scan.sizes, **scan.tile("writes_backward"), **scan.gates, PI=scan.pi,
                )  # fmt: skip
            if d_last_pi is None:
                # x, v and the logits are a, b and the static ones
                return d_key, d_value, d_q, d_r, d_decay, None, d_main, *[None] * 6
            d_last_pi = d_last_pi.contiguous()
            d_x, d_v, d_a, d_b = (torch.empty_like(a) for _ in range(4))
            d_eta, d_alpha, d_pi = scan.column(a), scan.column(a), torch.empty_like(d_last_pi)
            pi_backward_kernel[scan.serial](
                a, b, *makers, pi_states,
                made.key, made.key_scale, made.value, pi_write, made.spread,
                made.eta_logits, made.alpha_logits,
                d_key, d_value, d_write, d_r, d_decay, d_state, d_last_pi, carried,
                d_x, d_v, d_eta, d_alpha, d_pi, *scan.sizes, scan.heads, **scan.rule,
                **scan.tile("pi_backward"), MAIN=scan.main,
                DOCUMENTS=carried is not None,
            )  # fmt: skip
            each = max(1, scan.chunks * scan.sequences // _PROGRAMS)
            programs = -(-scan.chunks // each)
            sums = [d_pi.new_empty(scan.sequences, programs, x.shape[1], scan.d) for x in makers]
            inputs_backward_kernel[(programs * scan.sequences,)](
                a, b, *makers, pi_states, d_x, d_v, d_eta, d_alpha, d_a, d_b, *sums,
                *scan.sizes, scan.heads, each,
                **scan.tile("inputs_backward"), ADDITIVE=scan.additive,
            )  # fmt: skip
        d_makers = (x.unflatten(0, (-1, scan.heads)).sum((0, 2)) for x in sums)
        return d_a, d_b, d_q, d_eta, d_alpha, d_pi, d_main, None, *d_makers, None, None


class _Fed(NamedTuple):
    """What k, v and the gates are made of."""

    a: Tensor
    b: Tensor
    eta: Tensor
    alpha: Tensor


class _Written(NamedTuple):
    """What `writes_kernel` leaves, in the order of its arguments."""

    key: Tensor
    write: Tensor
    from_state: Tensor | None
    alpha_logits: Tensor
    key_scale: Tensor | None
    eta_logits: Tensor | None
    pi_write: Tensor | None
    value: Tensor | None
    spread: Tensor | None
    solve: Tensor | None


class _Scan:
    """Sizes and options that the kernels of one scan share."""

    def __init__(self, a: Tensor, pi: bool, main: bool, additive: bool, rules: MemoryRules) -> None:
        batch, self.heads, self.length, self.d = a.shape
        self.sequences, self.chunks = batch * self.heads, -(-self.length // rules.chunk)
        self.pi, self.main, self.additive, self.chunk = pi, main, additive, rules.chunk
        self.launches, self.columns = launches(self.d, generation(a)), COLUMNS[self.d]
        self.serial = (self.sequences,)
        self.by_columns = (self.sequences, self.d // self.columns)
        self.parallel = (self.chunks * self.sequences,)
        self.sizes = (self.length, self.chunks)
        self.gates = {"STRENGTH": rules.strength, "DECAYED": rules.decayed_write}
        self.rule = {"UNIT_VALUE": rules.normalize_value, "KEY_SHARE": rules.c, **self.gates}

    def tile(self, kernel: str) -> dict[str, int]:
        """Sizes and options of a kernel."""
        launch = self.launches[kernel]
        sizes = {"C": self.chunk, "D": self.d}
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        if launch.registers is not None:  # which compilers for other makers' GPUs do not know
            options["maxnreg"] = launch.registers
        return sizes | options

    def states(self, like: Tensor) -> Tensor:
        """A square for each chunk."""
        return like.new_empty(self.sequences, self.chunks, self.d, self.d)

    def column(self, like: Tensor) -> Tensor:
        """A number for each token."""
        return like.new_empty(like.shape[:3], dtype=torch.float32)

    def write(
        self,
        fed: _Fed,
        makers: list[Tensor | None],
        pi_states: Tensor | None,
        main_states: Tensor | None,
        for_backward: bool,
    ) -> _Written:
        def tile(wanted: bool, width: int = self.d) -> Tensor | None:
            return fed.a.new_empty(*fed.a.shape[:3], width) if wanted else None

        written = _Written(
            key=torch.empty_like(fed.a),
            write=torch.empty_like(fed.a),
            from_state=tile(self.main),
            alpha_logits=self.column(fed.a),
            key_scale=self.column(fed.a) if for_backward else None,
            eta_logits=self.column(fed.a) if for_backward else None,
            pi_write=tile(self.pi and self.main and for_backward),
            value=tile(self.pi and for_backward),
            spread=tile(self.pi and for_backward),
            solve=tile(for_backward, self.chunk),
        )
        kernel = "writes for backward" if for_backward else "writes"
        writes_kernel[self.parallel](
            *fed, *makers, pi_states, main_states, *written,
            *self.sizes, self.heads, **self.tile(kernel), **self.rule,
            PI=self.pi, MAIN=self.main, ADDITIVE=self.additive, FOR_BACKWARD=for_backward,
        )  # fmt: skip
        return written
