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
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> None:
    """See ops/encoder.py."""
    if x is not None:
        residual.add_(x)
    residual.copy_(functional.layer_norm(residual, residual.shape[-1:], weight, bias, eps))
    out.copy_(residual)


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
    qkv: Tensor, starts: Sequence[int], num_heads: int, scale: float, out: Tensor
) -> None:
    """See ops/encoder.py."""
    for rows in _spans(starts):
        # [3, 1, H, N, D], in memory of its own: how sums are made may depend on alignment.
        heads = qkv[rows].view(rows.stop - rows.start, 3, num_heads, -1)
        q, k, v = heads.permute(1, 2, 0, 3)[:, None].clone()
        attended = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out[rows] = attended[0].transpose(0, 1).flatten(1)


def _spans(starts: Sequence[int]) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in zip(starts[:-1], starts[1:], strict=True))
