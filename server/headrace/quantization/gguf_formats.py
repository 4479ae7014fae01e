"""Which stored types of GGUF files can be kept as packed weights. Imports no torch."""

from __future__ import annotations

from headrace_kernels.packed_format import GROUP, PackedFormat

PACKED_FORMATS = {
    "Q4_0": PackedFormat(4, has_minimum=False),
    "Q4_1": PackedFormat(4, has_minimum=True),
    "Q4_K": PackedFormat(4, has_minimum=True),
    "Q5_0": PackedFormat(8, has_minimum=False),
    "Q5_1": PackedFormat(8, has_minimum=True),
    "Q8_0": PackedFormat(8, has_minimum=False),
}
"""The others have a scale for every 16 values, or none."""


DENSE_TYPES = frozenset(("F64", "F32", "F16", "BF16"))
"""Stored types that have nothing to pack."""


def packed_format(quantization: str, shape: tuple[int, ...]) -> PackedFormat | None:
    """The format that holds a matrix of this stored type without rounding its integers."""
    if len(shape) != 2 or shape[1] % GROUP:
        return None
    return PACKED_FORMATS.get(quantization)


def why_not_packed(quantization: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this stored type has no packed form; None if it has one."""
    if packed_format(quantization, shape) is not None:
        return None
    if quantization not in PACKED_FORMATS:
        return f"no packed format for {quantization}"
    if len(shape) != 2:
        return "not a matrix"
    return f"its {shape[1]} inputs are not a multiple of {GROUP}"
