"""LayerNorm (Ba et al., arXiv 1607.06450) behind a residual add, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.weights import WeightSlots


class AddLayerNorm(nn.Module):
    def __init__(
        self,
        size: int,
        eps: float,
        context: LayerContext,
        *,
        bias: bool = True,
        keeps_sum: bool = False,
    ) -> None:
        """`keeps_sum`: the residual stream itself is not normalised."""
        super().__init__()
        self.weight = context.parameter(size, dtype=torch.float32)
        self.bias = context.parameter(size, dtype=torch.float32) if bias else None
        self.keeps_sum = keeps_sum
        self.eps = eps
        self._context = context

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add x [T, E], if there is one, to residual [T, E] fp32 and normalise that: in place,
        unless keeps_sum. The result is returned in the model dtype."""
        out = self._context.activations("normalised", *residual.shape)
        kernels = self._context.kernels
        kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps, out, self.keeps_sum)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        slots: WeightSlots = {f"{prefix}.weight": self.weight}
        if self.bias is not None:
            slots[f"{prefix}.bias"] = self.bias
        return slots
