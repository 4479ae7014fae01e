"""Ops of encoder models: what they take, what they promise, and the checks.

A batch is ragged: T tokens of R requests one after another, request i being the rows from
starts[i] to starts[i + 1]. What a request gets does not depend on the others, to the bit. Rows
behind the last request are padding: what they get is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check

ACTIVATIONS = ("gelu", "gelu_tanh", "relu")
"""gelu: Hendrycks and Gimpel, arXiv 1606.08415, with the error function; gelu_tanh: with tanh."""


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None = None,
    *,
    keeps_sum: bool = False,
) -> Tensor:
    """residual = layer_norm(residual + x) * weight + bias, in fp32, and out = residual.

    Ba et al., arXiv 1607.06450, behind the residual add, as BERT has it. Mutates `residual`: with
    keeps_sum it is only the sum afterwards, as models have it that normalise before each part.

    Args:
        x: [T, E], any float dtype, or None: nothing is added.
        residual: [T, E] float32, mutated.
        weight, bias: [E] float32; bias may be None.
        out: [T, E], any float dtype; like residual if None.
    """
    out = torch.empty_like(residual) if out is None else out
    if x is not None:
        check("x", x, residual, shape=residual.shape)
    check("weight", weight, residual, shape=residual.shape[-1:], dtype=torch.float32)
    if bias is not None:
        check("bias", bias, residual, shape=residual.shape[-1:], dtype=torch.float32)
    check("out", out, residual, shape=residual.shape)
    kernels_for(residual).add_layer_norm(x, residual, weight, bias, eps, out, keeps_sum)
    return out


def mlp_activation(
    x: Tensor, starts: Sequence[int], kind: str = "gelu", out: Tensor | None = None
) -> Tensor:
    """out = the activation `kind`, one of ACTIVATIONS, of each value, computed in fp32.

    Args:
        x: [T, F], any float dtype.
        starts: R + 1 ascending row numbers.
        out: [T, F], any float dtype; like x if None.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    out = torch.empty_like(x) if out is None else out
    _check_starts(starts, x)
    check("out", out, x, shape=x.shape)
    kernels_for(x).mlp_activation(x, starts, kind, out)
    return out


def bidirectional_attention(
    qkv: Tensor,
    starts: Sequence[int],
    num_heads: int,
    scale: float | None = None,
    out: Tensor | None = None,
    *,
    window: int | None = None,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """Attention of each token to all tokens of its own request: Devlin et al., arXiv 1810.04805.

    Args:
        qkv: [T, 3 * H * D]: the queries of all heads, then keys, then values.
        starts: R + 1 ascending row numbers.
        num_heads: H.
        scale: of the products of queries and keys; 1 / sqrt(D) if None.
        out: [T, H * D], in the dtype of qkv.
        window: tokens at most so far away are attended to, on either side; None: all.
        cos_sin: [positions, 2, D / 2] float32 of layers/rope.py, by which queries and keys are
            rotated (arXiv 2104.09864), positions being counted from 0 in each request; or None.
    """
    if qkv.shape[1] % (3 * num_heads):
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns, which 3 * {num_heads} heads cannot share"
        )
    width = qkv.shape[1] // 3
    out = qkv.new_empty(len(qkv), width) if out is None else out
    _check_starts(starts, qkv)
    check("out", out, qkv, shape=(len(qkv), width), dtype=qkv.dtype)
    scale = (width // num_heads) ** -0.5 if scale is None else scale
    kernels_for(qkv).bidirectional_attention(qkv, starts, num_heads, scale, out, window, cos_sin)
    return out


def _check_starts(starts: Sequence[int], x: Tensor) -> None:
    if list(starts) != sorted(starts) or not starts or starts[0] < 0 or starts[-1] > len(x):
        raise ValueError(f"starts must be ascending row numbers of {len(x)} rows, got {starts}")
