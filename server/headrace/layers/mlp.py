"""The gated MLP (SwiGLU, Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.linear import Linear
from headrace.layers.stored_rows import Rows, new_rows
from headrace.layers.weights import WeightSlots
from headrace.quantization.method import Format


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one product."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.intermediate_size = intermediate_size
        self.gate_up_proj = Linear(
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            bias=bias,
            context=context,
        )
        self.down_proj = Linear(
            intermediate_size,
            {"down_proj": hidden_size},
            bias=bias,
            context=context,
        )
        self._context = context

    @property
    def input_format(self) -> Format | None:
        return self.gate_up_proj.weight.input_format

    def forward(self, x: Rows) -> Tensor:
        """x: [T, E], in the model dtype or as input_format -> [T, E]."""
        gate_up, fmt = self.gate_up_proj(x), self.down_proj.weight.input_format
        activated = new_rows("activated", len(gate_up), self.intermediate_size, fmt, self._context)
        self._context.kernels.silu_and_mul(gate_up, activated.values, activated.scale)
        out: Tensor = self.down_proj(activated)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        return self.gate_up_proj.weight_slots(prefix) | self.down_proj.weight_slots(prefix)
