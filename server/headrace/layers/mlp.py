"""The gated MLP (SwiGLU, Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.layers.linear import Linear
from headrace.layers.weights import WeightSlots
from headrace_kernels.kernel_set import KernelSet


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSet,
    ) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up_proj = Linear(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            bias=bias,
            dtype=dtype,
            device=device,
            kernels=kernels,
        )
        self.down_proj = Linear(
            intermediate_size,
            {"down_proj": hidden_size},
            bias=bias,
            dtype=dtype,
            device=device,
            kernels=kernels,
        )
        self._silu_and_mul = kernels.silu_and_mul

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, E] in the model dtype -> [T, E]."""
        gate_up = self.gate_up_proj(x)
        activated = gate_up.new_empty((x.shape[0], self.intermediate_size))
        self._silu_and_mul(gate_up, activated)
        out: Tensor = self.down_proj(activated)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return self.gate_up_proj.weight_slots(prefix) | self.down_proj.weight_slots(prefix)
