"""Matrix products in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops/linear.py."""
    if out.dtype == x.dtype:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        return
    # torch's CPU GEMM rounds its fp32 accumulators to the input dtype. A second product that starts
    # from minus the rounded result returns what the rounding dropped: 16 bits of mantissa in all,
    # and twice bf16 still costs less than once fp32.
    rounded = torch.mm(x, weight.t())
    out.copy_(rounded)
    out.add_(torch.addmm(rounded.neg_(), x, weight.t()))
    if bias is not None:
        out.add_(bias)
