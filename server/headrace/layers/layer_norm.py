"""LayerNorm (Ba et al., arXiv 1607.06450) behind a residual add, in fp32, as BERT has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.weights import WeightSlots


class AddLayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, context: LayerContext) -> None:
        super().__init__()
        self.weight = context.parameter(size, dtype=torch.float32)
        self.bias = context.parameter(size, dtype=torch.float32)
        self.eps = eps
        self._context = context

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add x [T, E], if there is one, to residual [T, E] fp32 and normalise that, in place; the
        result is also returned in the model dtype."""
        out = self._context.activations("normalised", *residual.shape)
        kernels = self._context.kernels
        kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps, out)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return {f"{prefix}.weight": self.weight, f"{prefix}.bias": self.bias}
