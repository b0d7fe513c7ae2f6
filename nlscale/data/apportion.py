"""Shares of a sequence: weights as whole parts, and the order in which the parts come.

Of n places of a sequence, a source of weight w is to have n w, at every n and not only in the end.
`period` is a sequence that is never a whole place away from that, for any of the sources.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

MOST_PARTS = 1 << 16
"""Of a period: weights that need more are rounded to so many."""


def parts_of(weights: Sequence[Fraction]) -> tuple[list[int], bool]:
    """Weights as whole parts of the shortest period that has their shares.

    Where that is longer than `MOST_PARTS`, they are rounded to parts of it by largest remainders:
    each share is rounded down, and what is left goes to those that lost most by it, of equal ones
    to the first.

    Args:
        weights: above 0; their sum may be anything.

    Returns:
        The parts, and whether they are exactly in the ratio of the weights. A part is 0 where a
        share of less than about 1 / `MOST_PARTS` was rounded.

    Raises:
        ValueError: there are no weights, or one is not above 0.
    """
    if not weights or min(weights) <= 0:
        raise ValueError(f"weights are {list(map(str, weights))}; each must be above 0")
    shares = [weight / sum(weights) for weight in weights]
    period = lcm(*(share.denominator for share in shares))
    if period <= MOST_PARTS:
        return [int(share * period) for share in shares], True
    whole = [int(share * MOST_PARTS) for share in shares]
    left = MOST_PARTS - sum(whole)
    by_loss = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i] * MOST_PARTS, i))
    for i in by_loss[:left]:
        whole[i] += 1
    return whole, False


def period(parts: Sequence[int]) -> NDArray[np.int32]:
    r"""The order of one period of D = sum(parts) places; repeated, it is the sequence.

    With $x_i(n)$ places of source i among the first n, and its weight $w_i = q_i / D$,

    $$|x_i(n) - n w_i| < 1 \quad \text{for every source and every } n \ge 0.$$

    Proof. Give the j-th place of source i (j = 1, 2, ...) the window of places t, counted from 1,
    with $(j - 1) / w_i < t$ and $t \le \lceil j / w_i \rceil$. If each j-th place lies in its
    window, the bound holds: $x_i(n) = c$ means that the c-th has come, so $(c - 1) / w_i < n$, that
    is $c - n w_i < 1$; and that the next has not, so $n < \lceil (c + 1) / w_i \rceil$ and thus
    $n w_i - c < 1$. Such an order exists: let place t have the share of source i that lies in
    (t - 1, t] where its j-th unit is spread over $((j - 1) / w_i, j / w_i]$ at the rate $w_i$. Each
    place gets 1 in all, each unit 1 in all and within its window; that is a point of a transport
    polytope, whose corners are whole. And where any order keeps windows of units of one place, that
    which takes the open one that ends first does so (earliest deadline first). At n = D the bound
    leaves $x_i(D) = q_i$ alone, as $D w_i$ is whole, so the next period can be the same.

    It is the chairman assignment problem; the bound is that of Tijdeman (The chairman assignment
    problem, Discrete Mathematics 32, 1980), but for his sharper constant.

    Args:
        parts: q_i, whole and not negative; at least one is above 0.

    Returns:
        The source of each place: int32 [D]. Of windows that end together, the first source's is
        taken.
    """
    size = sum(parts)
    order = np.empty(size, dtype=np.int32)
    done = [0] * len(parts)
    # Of each source the next place alone: its later ones open and end later. Counted from 0, that
    # after `done` opens at done * D // q, and ends at the one before ceil((done + 1) * D / q).
    later = [(0, i) for i, q in enumerate(parts) if q]
    ready: list[tuple[int, int]] = []
    for place in range(size):
        while later and later[0][0] <= place:
            _, i = heapq.heappop(later)
            heapq.heappush(ready, (-(-(done[i] + 1) * size // parts[i]) - 1, i))
        _, i = heapq.heappop(ready)
        order[place] = i
        done[i] += 1
        if done[i] < parts[i]:
            heapq.heappush(later, (done[i] * size // parts[i], i))
    return order
