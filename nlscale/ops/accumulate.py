"""The gradient of a weight, added in fp32 to what earlier micro batches and steps have left.

Made in bf16 and added afterwards it would be rounded each time, and written and read once more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_product_(total: Tensor, d_output: Tensor, x: Tensor) -> None:
    """total += d_output^T x, summed in fp32.

    Args:
        total: fp32 [outputs, inputs].
        d_output: [tokens, outputs].
        x: [tokens, inputs], of the dtype of d_output.
    """
    left = d_output.t()
    if total.is_cuda and x.dtype != total.dtype:
        torch.addmm(total, left, x, out_dtype=total.dtype, out=total)
    else:  # elsewhere no product takes bf16 and leaves fp32
        total.addmm_(left.to(total.dtype), x.to(total.dtype))
