"""What packed weights look like, in numbers. Imports no torch: sizes are planned before loading."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32
"""Values along In that share a scale."""
COLUMNS = 16
"""Outputs of a column block."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """Weights of `bits` bits: d * u + m with a minimum, d * (u - 2^(bits - 1)) without.

    The packed tensor is uint8 [ceil(Out / 16), In / 32, block_bytes]: for each 16 outputs, and for
    each 32 inputs of those, the unsigned integers u in the order in which a dot product of four
    bytes takes them, then 16 scales d, then 16 minima m, both in fp16. 8 bits: [8][16 outputs][4
    inputs]. 4 bits: [4][16 outputs][4 bytes], with input i in the low and i + 16 in the high half.
    """

    bits: int
    has_minimum: bool

    @property
    def zero(self) -> int:
        return 0 if self.has_minimum else 1 << (self.bits - 1)

    @property
    def integer_bytes(self) -> int:
        return COLUMNS * GROUP * self.bits // 8

    @property
    def block_bytes(self) -> int:
        return self.integer_bytes + COLUMNS * (4 if self.has_minimum else 2)

    def shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Of the packed tensor; rows beyond `out_features` fill the last block."""
        return -(-out_features // COLUMNS), in_features // GROUP, self.block_bytes

    def nbytes(self, out_features: int, in_features: int) -> int:
        blocks, groups, block_bytes = self.shape(out_features, in_features)
        return blocks * groups * block_bytes


FORMATS = {
    fmt.block_bytes: fmt
    for fmt in (PackedFormat(bits, minimum) for bits in (4, 8) for minimum in (False, True))
}
"""By bytes of a group of a column block: how a packed tensor says what it is."""
