"""QK-norm, rotary embedding and the write into the paged KV cache, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.kv_format import write_tokens
from headrace_kernels.reference.norm import rms_norm


def rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    q_out: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """See ops/rope.py."""
    num_tokens, num_heads, head_dim = q_out.shape
    num_kv_heads = kv_cache.shape[2]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    qk = heads[:, : num_heads + num_kv_heads].float()
    if q_norm is not None and k_norm is not None:
        normed = torch.empty_like(qk)
        rms_norm(qk[:, :num_heads], q_norm, eps, normed[:, :num_heads])
        rms_norm(qk[:, num_heads:], k_norm, eps, normed[:, num_heads:])
        qk = normed
    qk = _rotate(qk, cos_sin.index_select(0, positions))
    q_out.copy_(qk[:, :num_heads])

    keys, values = qk[:, num_heads:], heads[:, num_heads + num_kv_heads :]
    written = slot_mapping >= 0
    keys_values = torch.stack((keys, values.float()), dim=1)
    write_tokens(kv_cache, slot_mapping[written], keys_values[written])


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + rot/2) of each head. x: [T, heads, D], cos_sin: [T, 2, rot/2]."""
    half = cos_sin.shape[-1]
    cos, sin = cos_sin[:, 0:1], cos_sin[:, 1:2]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = torch.empty_like(x)
    torch.sub(first * cos, second * sin, out=rotated[..., :half])
    torch.add(second * cos, first * sin, out=rotated[..., half : 2 * half])
    if 2 * half < x.shape[-1]:
        rotated[..., 2 * half :] = x[..., 2 * half :]
    return rotated
