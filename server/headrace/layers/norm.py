"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), in fp32, with and without the residual add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.stored_rows import Rows, new_rows
from headrace.layers.weights import WeightSlots
from headrace.quantization.method import Format


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

    def forward(self, x: Tensor | None, residual: Tensor, fmt: Format | None = None) -> Rows:
        """Add x [T, E], if there is one, to residual [T, E] fp32 in place, and normalise that.

        `fmt` is the form that the product behind it takes.
        """
        (tokens, width), kernels = residual.shape, self._context.kernels
        out = new_rows("normalised", tokens, width, fmt, self._context, dtype=self.out_dtype)
        if x is None:
            kernels.rms_norm(residual, self.weight, self.eps, out.values, out.scale)
        else:
            kernels.add_rms_norm(x, residual, self.weight, self.eps, out.values, out.scale)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return {f"{prefix}.weight": self.weight}
