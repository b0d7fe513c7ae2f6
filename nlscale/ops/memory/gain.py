"""The Kalman gain: how strongly a memory writes by how uncertain it is (docs/concepts/memory.md).

A number a head and sequence, p, is the variance that the memory has left in a direction. A token
whose decay is alpha_t and whose static logit, the log of how much an observation is to be trusted,
is l_t does

    p^_t = alpha_t^2 p_{t-1} + omega                 what has decayed, and what is unknown anew
    eta_t = sigmoid(l_t + log p^_t)                  p^ / (r + p^) with r = exp(-l), the gain
    p_t = p^_t (1 - eta_t / d)                       a write settles one of d directions

from p_0 = 1, so that the gain enters the memory as a logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class KalmanGain(torch.autograd.Function):
    """The logits l_t + log p^_t and p after the tokens.

    Backward, with dl the derivative by the logit that is returned, and dp that by the p after the
    token,

        dlogit = dl - dp p^ eta (1 - eta) / d            dp^ = dp (1 - eta / d) + dlogit / p^
        dp (of the token before) = dp^ alpha^2           domega = sum of dp^

    where dp is linear in the dp after: one operation a token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        eta: Tensor,
        alpha: Tensor,
        noise: Tensor,
        p: Tensor,
        stands: Tensor | None,
        d: int,
    ) -> tuple[Tensor, Tensor]:
        """eta, alpha [batch, heads, time], log omega [heads], p [batch, heads]; `stands`, bool
        [batch, 1, time], is false where there is no token, and p stays; None: nowhere."""
        opened = torch.sigmoid(alpha)
        keep = _time_first(opened.square())
        omega = noise.exp()[:, None].expand_as(eta)
        if stands is not None:
            omega = omega * stands
        omega, logits = _time_first(omega), _time_first(eta).clone()
        before, expected = torch.empty_like(keep), torch.empty_like(keep)
        for p_before, p_hat, logit, keep_t, omega_t in zip(
            before, expected, logits, keep, omega, strict=True
        ):
            p_before.copy_(p)
            torch.addcmul(omega_t, keep_t, p, out=p_hat)
            logit.add_(p_hat.log())
            p = torch.addcmul(p_hat, p_hat, torch.sigmoid(logit), value=-1 / d)
        ctx.save_for_backward(before, expected, logits, keep, omega, opened)
        ctx.d = d
        return _time_last(logits), p.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor, d_p: Tensor) -> tuple[Tensor | None, ...]:
        before, expected, logits, keep, omega, opened = ctx.saved_tensors
        gain, dl = torch.sigmoid(logits), _time_first(d_logits)
        by_logit = expected * gain * (1 - gain) / -ctx.d
        inverse = 1 / expected
        slope = keep * (1 - gain / ctx.d + by_logit * inverse)
        offset, d_after = keep * dl * inverse, torch.empty_like(dl)
        for i in reversed(range(len(dl))):
            d_after[i] = d_p
            d_p = torch.addcmul(offset[i], slope[i], d_p)
        d_eta = torch.addcmul(dl, d_after, by_logit)
        d_expected = d_after * (1 - gain / ctx.d) + d_eta * inverse
        d_alpha = _time_last(2 * d_expected * before * keep) * (1 - opened)
        d_noise = (d_expected * omega).sum((0, 1))
        return _time_last(d_eta), d_alpha, d_noise, d_p, None, None


def _time_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous()


def _time_last(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous()
