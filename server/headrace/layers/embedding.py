"""Token embedding and the head that turns hidden states into logits, possibly one weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.layers.context import LayerContext
from headrace.layers.matrix import Matrix
from headrace.layers.stored_rows import Rows

LOGIT_ROWS = 256
"""Rows of logits made at a time: bounds the scratch of a wide vocabulary."""


class Embedding(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.weight = Matrix(vocab_size, hidden_size, context, is_table=True)
        self._context = context

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [T] int64 -> [T, E] fp32: the residual stream is fp32 from its start."""
        out = self._context.activations(
            "residual", len(token_ids), self.weight.in_features, dtype=torch.float32
        )
        self.weight.rows(token_ids, out)
        return out


def logits(hidden: Tensor, head: Matrix, context: LayerContext | None = None) -> Tensor:
    """hidden: [N, E] float, head: [V, E] -> [N, V] fp32; a row's bits depend on that row only.

    With `context` they are in its memory, which the next call with it overwrites.
    """
    count = hidden.shape[0]
    if head.dense is not None:
        hidden = hidden.to(head.dense.dtype)
    if padding := -count % head.row_multiple:
        hidden = functional.pad(hidden, (0, 0, 0, padding))
    shape = (hidden.shape[0], head.out_features)
    if context is not None:
        out = context.activations("logits", *shape, dtype=torch.float32)
    else:
        out = hidden.new_empty(shape, dtype=torch.float32)
    for begin in range(0, hidden.shape[0], LOGIT_ROWS):
        rows = slice(begin, begin + LOGIT_ROWS)
        head.multiply(Rows(hidden[rows]), None, out[rows])
    return out[:count]
