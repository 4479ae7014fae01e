"""Gated activations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.reference.quantization import quantize_rows


def silu_and_mul(gate_up: Tensor, out: Tensor, out_scale: Tensor | None = None) -> None:
    """See ops/activation.py."""
    gate, up = gate_up.chunk(2, dim=-1)
    # Not F.silu: its scalar tail rounds differently from its vector body, and which elements fall
    # into the tail depends on the batch and on the number of threads. exp has one code path.
    silu = torch.neg(gate.float()).exp_().add_(1.0)
    torch.div(gate, silu, out=silu)
    if out_scale is None:
        torch.mul(silu, up, out=out)
    else:
        quantize_rows(silu * up, out, out_scale)
