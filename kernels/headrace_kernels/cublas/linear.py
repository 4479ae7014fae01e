"""Dense products: Triton's for few tokens, where bytes count, and cuBLAS's for many.

cuBLAS picks a kernel for each size, and each adds in its own order: a row's bits depend on T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.triton import linear as few

FEW_TOKENS = 64
"""Up to here reading weights takes longer than multiplying by them, on any GPU that is served."""


def declines(facts: KernelFacts) -> str | None:
    return few.declines(facts)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops/linear.py. fp32 results of 16-bit inputs, a head's, are Triton's for every T."""
    if len(x) <= FEW_TOKENS or out.dtype != x.dtype:
        few.linear(x, weight, bias, out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
