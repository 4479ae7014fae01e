"""Token embedding and the head that turns hidden states into logits, possibly one weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.layers.linear import parameter
from headrace_kernels.kernel_set import KernelSet

LOGIT_ROWS = 256
"""Rows of logits made at a time: bounds the scratch of a wide vocabulary."""
ROW_MULTIPLE = 8
"""GEMM rows are padded to this: see the CPU reference's tail in headrace_kernels."""


class Embedding(nn.Module):
    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype, device=device)

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] int64 -> [T, E] fp32: the residual stream is fp32 from its start."""
        return functional.embedding(token_ids, self.weight).float()


def logits(hidden: Tensor, head: Tensor, kernels: KernelSet) -> Tensor:
    """hidden: [N, E], head: [V, E] -> [N, V] fp32; each row's bits depend on that row only."""
    count = hidden.shape[0]
    padded = functional.pad(hidden, (0, 0, 0, -count % ROW_MULTIPLE)).to(head.dtype)
    out = torch.empty((padded.shape[0], head.shape[0]), dtype=torch.float32, device=hidden.device)
    for begin in range(0, padded.shape[0], LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        kernels.linear(padded[rows], head, None, out[rows])
    return out[:count]
