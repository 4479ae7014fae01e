"""The op that rounds activations to 8 bits: what it takes, what it promises, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.ops.checks import check
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
    check("out", out, x, shape=x.shape)
    if scale.ndim != 2 or scale.shape[1] == 0 or x.shape[1] % scale.shape[1]:
        raise ValueError(
            f"scale must be [T, G] with G a divisor of {x.shape[1]}, not {list(scale.shape)}"
        )
    check("scale", scale, x, shape=(len(x), scale.shape[1]), dtype=torch.float32)
    kernels_for(x).quantize_rows(x, out, scale)
