"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), in fp32, with and without the residual add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.weights import WeightSlots


class RMSNorm(nn.Module):
    def __init__(
        self,
        size: int,
        eps: float,
        *,
        context: LayerContext,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = context.parameter(size, dtype=torch.float32)
        self.eps = eps
        self.out_dtype = out_dtype or context.dtype
        self._context = context

    def forward(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add x [T, E], if there is one, to residual [T, E] fp32 in place, and normalise that."""
        out = self._context.activations("normalised", *residual.shape, dtype=self.out_dtype)
        if x is None:
            self._context.kernels.rms_norm(residual, self.weight, self.eps, out)
        else:
            self._context.kernels.add_rms_norm(x, residual, self.weight, self.eps, out)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return {f"{prefix}.weight": self.weight}
