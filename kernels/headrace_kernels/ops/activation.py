"""Gated activation ops: what they take, what they promise, and the checks."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check_out


def silu_and_mul(
    gate_up: Tensor, out: Tensor | None = None, out_scale: Tensor | None = None
) -> Tensor:
    """out = gate * sigmoid(gate) * up, computed in fp32 (SwiGLU: Shazeer, arXiv 2002.05202).

    Args:
        gate_up: [T, 2 F], any float dtype: gate in the first half of a row, up in the second.
        out: [T, F], any float dtype; that of gate_up if None. Or int8 or float8_e4m3fn, with
        out_scale: [T, G] float32: what ops/quantization.py makes of the fp32 result.
    """
    tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up must have an even width, not {width}")
    out = gate_up.new_empty((tokens, width // 2)) if out is None else out
    check_out(out, out_scale, gate_up, shape=(tokens, width // 2))
    kernels_for(gate_up).silu_and_mul(gate_up, out, out_scale)
    return out
