"""Memory that an update takes in passing, beside what is kept from one to the next.

Every rule: at the updates at which the ratio of update to weights is measured, a copy of the fp32
weights of all that is due; of what lies in host memory, of a slot of the ring. Rules over whole
matrices, one sync group after the other:

    ranges     what the rule makes of this rank's ranges of matrices, fp32
    on their way    the same and what has arrived from others, in bf16 or fp32
    whole      the matrices that this rank owns, of every argument and result of the call
    products   Newton-Schulz of all that it owns of one shape at once: x, a x, their product and
               their sum, and b A, c A^2 of A = x x^T; the arguments in fp32 besides, in bf16 runs

The largest moment of these counts, of the owner that has most. Matrices are dealt as in training
(`nlscale.levels.passes.GroupMatrices`); ranges are taken to be equal parts. Left out are what is
made for one matrix at a time, and what a GPU's library takes for a product.
"""

from __future__ import annotations

import numpy as np

from nlscale.config.vocabulary import Config, Dtype
from nlscale.levels.groups import parameters_by_depth
from nlscale.levels.passes import GroupMatrices, Shapes, group_matrices, value_bytes
from nlscale.levels.ring_pieces import RING_SLOTS, on_host, ring_bytes
from nlscale.levels.spectrum import Level, sync_group
from nlscale.optim.table import OnWhole
from nlscale.plan.traffic import add_updates, cycle_steps

_FP32 = 4


def update_bytes(
    config: Config, levels: list[Level], vocabulary: int, depths: list[int], owners: int
) -> float:
    """Bytes on one GPU, at the fullest moment of the fullest step.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        depths: of the blocks that the rank holds.
        owners: ranks that share the optimizer's state of these.
    """
    copied = np.zeros(cycle_steps(levels))
    stagger, layers = config.levels.stagger, config.model.layers
    host = on_host(config)
    for level, by_depth in zip(levels, parameters_by_depth(config, vocabulary), strict=True):
        for depth in () if host[level.index] else depths:
            group = sync_group(level, depth, layers, stagger)
            add_updates(copied, group, [_FP32 * by_depth[depth] / owners])
    passing = [
        _of_group(config, g, owners) for g in group_matrices(config, levels, stagger, depths)
    ]
    slot = ring_bytes(config) / RING_SLOTS if any(host) else 0.0
    return float(copied.max()) + max(passing, default=0.0) + slot


def _of_group(config: Config, g: GroupMatrices, owners: int) -> float:
    """The fullest moment of its updates, of the owner that has most."""
    held = g.level.elements_of(g.depths) / owners
    return max(
        _of_call(config, call.kind, held, g.level.elements_of(depths) / owners, owned, owners)
        for update in g.updates()
        for call, depths in update
        if depths
        for owned in g.owned(owners, depths)
    )


def _of_call(
    config: Config, call: OnWhole, held: float, sent: float, owned: Shapes, owners: int
) -> float:
    """Of a call at an owner, from the elements of its ranges and of those that it sends."""
    bf16, value = config.train.dtype == Dtype.bf16, value_bytes(config)
    whole = sum(out * into * number for (out, into), number in owned.items())
    arrives = value * (whole if owners > 1 else 0)
    cast = value * sent if bf16 else 0.0
    gathered = (call.given - 1) * value * whole + cast + value * sent + arrives + value * whole
    moments = [gathered]
    for (out, into), number in owned.items():
        argument, gram = number * out * into, number * min(out, into) ** 2
        products = max(4 * argument + gram, 3 * argument + 2 * gram, 2 * argument + 4 * gram)
        moments.append(
            value * (call.given * whole + call.results * (whole - argument))
            + value * ((1 + call.beside) * argument + products)
            + (_FP32 * argument if bf16 else 0.0)
        )
    returns = value * (sent if owners > 1 else 0.0) + call.results * _FP32 * held
    moments.append(value * whole * (call.given + call.results + 2) + returns)
    return call.ranges * _FP32 * held + max(moments)
