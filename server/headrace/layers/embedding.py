"""Token embedding and the head that turns hidden states into logits, possibly one weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.layers.matrix import Matrix
from headrace_kernels.kernel_set import KernelSet

LOGIT_ROWS = 256
"""Rows of logits made at a time: bounds the scratch of a wide vocabulary."""
ROW_MULTIPLE = 8
"""GEMM rows are padded to this: see the CPU reference's tail in headrace_kernels."""


class Embedding(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        super().__init__()
        self.weight = Matrix(vocab_size, hidden_size, dtype=dtype, device=device, kernels=kernels)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] int64 -> [T, E] fp32: the residual stream is fp32 from its start."""
        return self.weight.rows(token_ids)


def logits(hidden: Tensor, head: Matrix) -> Tensor:
    """hidden: [N, E] fp32, head: [V, E] -> [N, V] fp32; a row's bits depend on that row only."""
    count = hidden.shape[0]
    if head.packed is None:
        hidden = functional.pad(hidden, (0, 0, 0, -count % ROW_MULTIPLE)).to(head.dtype)
    out = torch.empty(
        (hidden.shape[0], head.out_features), dtype=torch.float32, device=hidden.device
    )
    for begin in range(0, hidden.shape[0], LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        head.multiply(hidden[rows], None, out[rows])
    return out[:count]
