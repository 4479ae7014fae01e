"""Embedding op: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of `weight` as they are, in fp32: the residual stream is fp32 from its start.

    Args:
        token_ids: [T] int64. One outside of [0, V) is an IndexError or RuntimeError on a CPU; on a
            GPU, which cannot raise without waiting, its row is NaN, and so is what follows from it.
        weight: [V, E], float32, bfloat16 or float16.
        out: [T, E] float32.
    """
    if token_ids.ndim != 1 or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be int64 [T], not {token_ids.dtype} {token_ids.shape}")
    shape = (len(token_ids), weight.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=weight.device)
    check("out", out, weight, shape=shape, dtype=torch.float32)
    kernels_for(weight).embedding(token_ids, weight, out)
    return out
