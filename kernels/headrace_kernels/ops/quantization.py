"""The op that rounds activations to 8 bits: what it takes, what it promises, and the checks."""

from __future__ import annotations

from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check, check_scale
from headrace_kernels.reference.quantization import LIMITS


def quantize_rows(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """out * scale = x, with one scale for each group of inputs of a row.

    scale = max|x| / 127 (int8) or / 448 (e4m3, arXiv 2209.05433), NaN if any of the group's x is
    NaN or infinite; out = x * (127 or 448) / max|x|, rounded to nearest, ties to even; 0 for a
    group of zeros. Dynamic: nothing is calibrated.

    Args:
        x: [T, In], any float dtype.
        out: [T, In], int8 or float8_e4m3fn.
        scale: [T, G] float32; G divides In. G = 1 is one scale a row.
    """
    if out.dtype not in LIMITS:
        raise ValueError(f"out must be int8 or float8_e4m3fn, not {out.dtype}")
    check("out", out, x, shape=x.shape, dtype=out.dtype)
    check_scale("scale", scale, x)
    kernels_for(x).quantize_rows(x, out, scale)
