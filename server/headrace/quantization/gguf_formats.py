"""Which stored types of GGUF files can be kept as packed weights. Imports no torch."""

from __future__ import annotations

import dataclasses

from headrace_kernels.packed_format import GROUP, PackedFormat

PACKED_FORMATS = {
    "Q4_0": PackedFormat(4, has_minimum=False),
    "Q4_1": PackedFormat(4, has_minimum=True),
    "Q5_0": PackedFormat(8, has_minimum=False),
    "Q5_1": PackedFormat(8, has_minimum=True),
    "Q8_0": PackedFormat(8, has_minimum=False),
    "Q2_K": PackedFormat(4, has_minimum=True, inputs_per_scale=16),
    "Q3_K": PackedFormat(4, has_minimum=False, inputs_per_scale=16),
    "Q4_K": PackedFormat(4, has_minimum=True),
    "Q5_K": PackedFormat(8, has_minimum=True),
    "Q6_K": PackedFormat(8, has_minimum=False, inputs_per_scale=16),
}
"""The others are floats already."""


DENSE_TYPES = frozenset(("F64", "F32", "F16", "BF16"))
"""Stored types that have nothing to pack."""


def packed_format(
    quantization: str, shape: tuple[int, ...], *, exact_scales: bool = False
) -> PackedFormat | None:
    """The format that holds a matrix of this stored type without rounding its integers.

    The scales of K-quants are products of an fp16 number and an integer of 4 to 8 bits. They are
    rounded to fp16, unless `exact_scales` asks for fp32, which holds them.
    """
    if len(shape) != 2 or shape[1] % GROUP:
        return None
    fmt = PACKED_FORMATS.get(quantization)
    if fmt is None or not exact_scales or not quantization.endswith("_K"):
        return fmt
    return dataclasses.replace(fmt, scale_bits=32)


def why_not_packed(quantization: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this stored type has no packed form; None if it has one."""
    if packed_format(quantization, shape) is not None:
        return None
    if quantization not in PACKED_FORMATS:
        return f"no packed format for {quantization}"
    if len(shape) != 2:
        return "not a matrix"
    return f"its {shape[1]} inputs are not a multiple of {GROUP}"
