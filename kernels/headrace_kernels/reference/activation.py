"""Gated activations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor, out: Tensor) -> None:
    """See ops/activation.py."""
    gate, up = gate_up.chunk(2, dim=-1)
    # Not F.silu: its scalar tail rounds differently from its vector body, and which elements fall
    # into the tail depends on the batch and on the number of threads. exp has one code path.
    silu = torch.neg(gate.float()).exp_().add_(1.0)
    torch.div(gate, silu, out=silu)
    torch.mul(silu, up, out=out)
