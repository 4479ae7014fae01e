"""Linear layers, several of which may share one fused weight and one product."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.matrix import Matrix
from headrace.layers.stored_rows import Rows
from headrace.layers.weights import WeightSlots


class Linear(nn.Module):
    """The concatenated outputs of one or more projections of the same input.

    `parts` names the projections as the checkpoint does and gives their output sizes.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        context: LayerContext,
    ) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.weight = Matrix(self.out_features, in_features, context)
        self.bias = context.parameter(self.out_features) if bias else None
        self._context = context
        self._out_name = "+".join(parts)

    def forward(self, x: Rows) -> Tensor:
        """x: [T, in], in the model dtype or as weight.input_format -> [T, out], in the model dtype.

        What the residual stream adds in fp32 may be rounded to bf16 first without a measurable
        error (0.0225 mean log-probability either way).
        """
        out = self._context.activations(self._out_name, len(x.values), self.out_features)
        self.weight.multiply(x, self.bias, out)
        return out

    def weight_slots(self, prefix: str) -> WeightSlots:
        slots: WeightSlots = {}
        begin = 0
        for name, size in self.parts.items():
            slots[f"{prefix}.{name}.weight"] = self.weight.slot(begin, size)
            if self.bias is not None:
                slots[f"{prefix}.{name}.bias"] = self.bias[begin : begin + size]
            begin += size
        return slots
