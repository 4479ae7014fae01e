"""What encoders have and decoders have not, in plain torch: each request is computed by itself.

So the bits of a request do not depend on its neighbours: torch splits elementwise work and
attention over threads and vector widths by the size of what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    keeps_sum: bool = False,
) -> None:
    """See ops/encoder.py."""
    if x is not None:
        residual.add_(x)
    normalised = functional.layer_norm(residual, residual.shape[-1:], weight, bias, eps)
    if not keeps_sum:
        residual.copy_(normalised)
    out.copy_(normalised)


def mlp_activation(x: Tensor, starts: Sequence[int], kind: str, out: Tensor) -> None:
    """See ops/encoder.py."""
    for rows in _spans(starts):
        if kind == "relu":
            out[rows] = torch.relu(x[rows])
        else:
            out[rows] = functional.gelu(
                x[rows].float(), approximate="tanh" if kind == "gelu_tanh" else "none"
            )


def bidirectional_attention(
    qkv: Tensor,
    starts: Sequence[int],
    num_heads: int,
    scale: float,
    out: Tensor,
    window: int | None = None,
    cos_sin: Tensor | None = None,
) -> None:
    """See ops/encoder.py."""
    for rows in _spans(starts):
        # [3, 1, H, N, D], in memory of its own: how sums are made may depend on alignment.
        heads = qkv[rows].view(-1, 3, num_heads, qkv.shape[1] // (3 * num_heads))
        q, k, v = heads.permute(1, 2, 0, 3)[:, None].clone()
        if cos_sin is not None:
            q, k = _rotated(q, cos_sin), _rotated(k, cos_sin)
        mask = None if window is None else _near(q.shape[2], window, q.device)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out[rows] = attended[0].transpose(0, 1).flatten(1)


def _rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x: [1, H, N, D], rotated by the angles of the positions from 0 on."""
    cos, sin = cos_sin[: x.shape[2]].unbind(1)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def _near(count: int, window: int, device: torch.device) -> Tensor:
    """[N, N] bool: whether two positions are at most `window` apart."""
    positions = torch.arange(count, device=device)
    return (positions[:, None] - positions).abs() <= window


def _spans(starts: Sequence[int]) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in zip(starts[:-1], starts[1:], strict=True))
