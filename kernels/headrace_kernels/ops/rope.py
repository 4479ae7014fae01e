"""The op between QKV projection and attention: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.kv_format import head_dim_of
from headrace_kernels.ops.checks import check


def rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    q_out: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Normalise each head of q and k (if asked), rotate both, and write k and v into the cache.

    Rotary embedding (Su et al., arXiv 2104.09864) turns the pairs (i, i + rot/2) of the first rot
    values of a head; the others stay. Norm and rotation are fp32. Mutates `kv_cache`.

    Args:
        qkv: [T, (H + 2 K) * D], contiguous: the heads of q, then k, then v.
        positions: [T] int64, each a row of cos_sin. One that is none raises on a CPU; a GPU, which
            cannot raise without waiting, takes the nearest.
        cos_sin: [max_positions, 2, rot / 2] float32; rot = 0 rotates nothing.
        kv_cache: [B, 2, K, P, D], of any strides; or int8 or float8_e4m3fn [B, 2, K, P, D + 4],
            pages of which kv_format.py tells the layout, with one scale a token and head.
        slot_mapping: [T] int64: block * P + offset to write to; -1 writes nothing. So does one
            behind the cache on a GPU; on a CPU it raises.
        q_out: [T, H, D]; made in the dtype of qkv if None.
        q_norm, k_norm: [D] RMSNorm weights (QK-norm, Henry et al., arXiv 2010.04245), both or none.
        eps: of these norms.
    """
    tokens, width = qkv.shape
    _, two, num_kv_heads, _, _ = kv_cache.shape
    head_dim = head_dim_of(kv_cache)
    heads, rest = divmod(width, head_dim)
    if rest or heads <= 2 * num_kv_heads or two != 2:
        raise ValueError(
            f"qkv of width {width} does not hold heads of {head_dim} for a cache of shape "
            f"{tuple(kv_cache.shape)}"
        )
    num_heads = heads - 2 * num_kv_heads
    q_out = qkv.new_empty((tokens, num_heads, head_dim)) if q_out is None else q_out
    check("q_out", q_out, qkv, shape=(tokens, num_heads, head_dim))
    check("positions", positions, qkv, shape=(tokens,), dtype=torch.int64)
    check("slot_mapping", slot_mapping, qkv, shape=(tokens,), dtype=torch.int64)
    half = cos_sin.shape[-1]
    check("cos_sin", cos_sin, qkv, shape=(cos_sin.shape[0], 2, half), dtype=torch.float32)
    if 2 * half > head_dim:
        raise ValueError(f"cos_sin rotates {2 * half} values of heads that have {head_dim}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm come together")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check(name, weight, qkv, shape=(head_dim,))
    kernels_for(qkv, kv_cache).rope_and_write_kv(
        qkv, positions, cos_sin, kv_cache, slot_mapping, q_out, q_norm, k_norm, eps
    )
    return q_out
