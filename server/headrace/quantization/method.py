"""QuantMethod: how tensors of a checkpoint become packed weights. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from headrace_kernels.packed_format import PackedFormat

if TYPE_CHECKING:
    from torch import Tensor


class StoredTensor(Protocol):
    """A tensor of a checkpoint, still on disk."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class QuantMethod(Protocol):
    def packed_format(self, tensor: StoredTensor) -> PackedFormat | None:
        """The format in which `tensor` can be kept; None if it has to be dequantized."""
        ...

    def pack_into(self, tensor: StoredTensor, packed: Tensor) -> None:
        """Pack [Out, In] into uint8 of the shape that its format gives. Integers are exact.

        Raises CheckpointError, naming the tensor, if a scale is not finite.
        """
        ...
