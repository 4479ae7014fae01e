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


def packed_format(quantization: str, shape: tuple[int, ...]) -> PackedFormat | None:
    """The format that holds a matrix of this stored type without rounding its integers."""
    if len(shape) != 2 or shape[1] % GROUP:
        return None
    return PACKED_FORMATS.get(quantization)
