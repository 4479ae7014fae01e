"""What packed weights look like, in numbers. Imports no torch: sizes are planned before loading."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32
"""Values along In that are stored and multiplied together; they share a scale, or two do."""
COLUMNS = 16
"""Outputs of a column block."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """Weights of `bits` bits: d * u + m with a minimum, d * (u - 2^(bits - 1)) without.

    The packed tensor is uint8 [ceil(Out / 16), In / 32, block_bytes]: for each 16 outputs, and for
    each 32 inputs of those, the unsigned integers u in the order in which a dot product of four
    bytes takes them, then 16 scales d, then 16 minima m. 8 bits: [8][16 outputs][4 inputs]. 4 bits:
    [4][16 outputs][4 bytes], with input i in the low and i + 16 in the high half.
    """

    bits: int
    has_minimum: bool
    inputs_per_scale: int = GROUP
    """32, or 16: then there are 16 scales and minima of the first 16 inputs, and of the others."""
    scale_bits: int = 16
    """Of scales and minima: fp16, or fp32 for products of two numbers that fp16 would round."""

    @property
    def code(self) -> int:
        """What the native kernels call it by."""
        return self.bits + 16 * self.has_minimum + 32 * (self.parts == 2) + self.scale_bits * 4 - 64

    @property
    def parts(self) -> int:
        """Scales of a group."""
        return GROUP // self.inputs_per_scale

    @property
    def zero(self) -> int:
        return 0 if self.has_minimum else 1 << (self.bits - 1)

    @property
    def integer_bytes(self) -> int:
        return COLUMNS * GROUP * self.bits // 8

    @property
    def scales_bytes(self) -> int:
        """Of the scales of a group of a column block, and of its minima."""
        return COLUMNS * self.parts * self.scale_bits // 8

    @property
    def block_bytes(self) -> int:
        return self.integer_bytes + self.scales_bytes * (2 if self.has_minimum else 1)

    def shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Of the packed tensor; rows beyond `out_features` fill the last block."""
        return -(-out_features // COLUMNS), in_features // GROUP, self.block_bytes

    def nbytes(self, out_features: int, in_features: int) -> int:
        blocks, groups, block_bytes = self.shape(out_features, in_features)
        return blocks * groups * block_bytes


FORMATS = (
    PackedFormat(4, False),
    PackedFormat(4, True),
    PackedFormat(8, False),
    PackedFormat(8, True),
    PackedFormat(4, False, 16),
    PackedFormat(4, True, 16),
    PackedFormat(8, False, 16),
    PackedFormat(4, True, scale_bits=32),
    PackedFormat(8, True, scale_bits=32),
    PackedFormat(4, False, 16, scale_bits=32),
    PackedFormat(4, True, 16, scale_bits=32),
    PackedFormat(8, False, 16, scale_bits=32),
)
"""Those that kernels take; with scales in fp32 only if activations keep 16 bits."""
