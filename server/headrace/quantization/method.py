"""QuantMethod: in which form tensors of a checkpoint are kept, and how they get there.

Imports no torch: sizes are planned before loading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from headrace_kernels.packed_format import PackedFormat

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Outputs and inputs of weights that share a scale, if scales are of blocks."""


@dataclass(frozen=True, slots=True)
class ScaledFormat:
    """8-bit weights [Out, In] beside fp32 scales, as ops/scaled_linear.py takes them.

    The scales are [Out, 1], or [ceil(Out / 128), In / 128] of blocks.
    """

    dtype: Literal["int8", "e4m3"]
    of_blocks: bool = False

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        if self.of_blocks:
            return -(-out_features // BLOCK), in_features // BLOCK
        return out_features, 1

    def nbytes(self, out_features: int, in_features: int) -> int:
        scale_rows, scale_columns = self.scale_shape(out_features, in_features)
        return out_features * in_features + 4 * scale_rows * scale_columns


Format = PackedFormat | ScaledFormat


class StoredTensor(Protocol):
    """A tensor of a checkpoint, still on disk."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_into(self, out: Tensor) -> None:
        """Convert, or dequantize, into `out` of this shape."""
        ...


class QuantMethod(Protocol):
    def format_of(self, tensor: StoredTensor) -> Format | None:
        """The form in which `tensor` can be kept; None if it has to become dense."""
        ...

    def read(self, tensor: StoredTensor, fmt: Format, into: tuple[Tensor, ...]) -> None:
        """Read [Out, In] in the form `fmt`: into the packed tensor, or into weights and scales.

        Stored integers stay exact. Raises CheckpointError, naming the tensor, if a scale is not
        finite.
        """
        ...
