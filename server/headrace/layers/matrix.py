"""Matrix: the weight of linear layers, embedding and head, dense or packed as its tensors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.weights import WeightTensor
from headrace.quantization.method import QuantMethod
from headrace_kernels.packed_format import COLUMNS, FORMATS
from headrace_kernels.packed_weight import unpack

TORCH_ROW_MULTIPLE = 8
"""The last rows of a product by torch, beyond a multiple of this, are computed in another order."""


class Matrix(nn.Module):
    """[Out, In]: in the model dtype, or the stored integers in packed form.

    Which of them it is shows when its tensors are read, and memory is taken then. Rows of several
    tensors are packed if all of them have the same packed format, and begin and end with a block.
    """

    def __init__(self, out_features: int, in_features: int, context: LayerContext) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.dense: nn.Parameter | None = None
        self.packed: nn.Parameter | None = None
        self._context = context
        self._kernels = context.kernels

    def slot(self, begin: int = 0, rows: int | None = None) -> MatrixSlot:
        """Where the tensor of rows [begin, begin + rows) is read into; of all by default."""
        return MatrixSlot(self, begin, self.out_features if rows is None else rows)

    @property
    def row_multiple(self) -> int:
        """What the rows of `x` are padded to, so that the bits of each depend on that row only."""
        stem = "linear" if self.packed is None else "quantized_linear"
        return 1 if dict(self._kernels.names)[stem] == "cpu" else TORCH_ROW_MULTIPLE

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x @ self.T + bias. x: [T, In] in the model dtype, or fp32 if this is packed."""
        if self.packed is not None:
            self._kernels.quantized_linear(x, self.packed, bias, out)
        else:
            assert self.dense is not None, "the weights have not been read"
            self._kernels.linear(x, self.dense, bias, out)

    def rows(self, indices: Tensor, out: Tensor) -> None:
        """out = the rows of these indices. indices: [T] int64, out: [T, In] fp32."""
        if self.packed is not None:
            self._kernels.quantized_embedding(indices, self.packed, out)
        else:
            assert self.dense is not None, "the weights have not been read"
            self._kernels.embedding(indices, self.dense, out)

    def read(self, begin: int, end: int, tensor: WeightTensor, method: QuantMethod | None) -> None:
        """Read the rows [begin, end)."""
        fmt = method.packed_format(tensor) if method is not None else None
        whole_blocks = begin % COLUMNS == 0 and (end % COLUMNS == 0 or end == self.out_features)
        if fmt is not None and whole_blocks and self.dense is None:
            if self.packed is None:
                shape = fmt.shape(self.out_features, self.in_features)
                self.packed = self._context.parameter(*shape, dtype=torch.uint8)
            if FORMATS[self.packed.shape[2]] == fmt:
                assert method is not None
                method.pack_into(tensor, self.packed[begin // COLUMNS : -(-end // COLUMNS)])
                return
        tensor.read_into(self._as_dense()[begin:end])

    def _as_dense(self) -> Tensor:
        """The dense parameter, which takes over what has been packed already."""
        if self.dense is None:
            shape = (self.out_features, self.in_features)
            self.dense = self._context.parameter(*shape)
            if self.packed is not None:
                self.dense.copy_(unpack(self.packed)[: self.out_features])
                self.packed = None
        return self.dense


@dataclass(frozen=True, slots=True)
class MatrixSlot:
    """Rows of a matrix that one tensor of a checkpoint is read into."""

    matrix: Matrix
    begin: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.matrix.in_features

    def read(self, tensor: WeightTensor, method: QuantMethod | None) -> None:
        self.matrix.read(self.begin, self.begin + self.rows, tensor, method)
