"""Matrix: the weight of linear layers, embedding and head, dense or packed as its tensors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.weights import WeightTensor
from headrace.quantization.method import QuantMethod
from headrace_kernels.packed_format import COLUMNS, PackedFormat
from headrace_kernels.packed_weight import unpack

TORCH_ROW_MULTIPLE = 8
"""The last rows of a product by torch, beyond a multiple of this, are computed in another order."""


@dataclass(slots=True)
class PackedRows:
    """Rows of a matrix that are packed alike; they begin and end with a column block."""

    begin: int
    end: int
    fmt: PackedFormat
    weight: Tensor
    """Of these rows alone, uint8, as `fmt` says."""


class Matrix(nn.Module):
    """[Out, In]: in the model dtype, or the stored integers in packed form.

    Which of them it is shows when its tensors are read, and memory is taken then. Rows of several
    tensors are packed, each in its own format, if all of them can be and begin and end with a
    block. Neighbours of one format are one product.
    """

    def __init__(self, out_features: int, in_features: int, context: LayerContext) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.dense: nn.Parameter | None = None
        self.packed: list[PackedRows] = []
        self.packed_weights = nn.ParameterList()
        self._whole: dict[PackedFormat, Tensor] = {}
        self._context = context
        self._kernels = context.kernels

    def slot(self, begin: int = 0, rows: int | None = None) -> MatrixSlot:
        """Where the tensor of rows [begin, begin + rows) is read into; of all by default."""
        return MatrixSlot(self, begin, self.out_features if rows is None else rows)

    @property
    def row_multiple(self) -> int:
        """What the rows of `x` are padded to, so that the bits of each depend on that row only."""
        stem = "quantized_linear" if self.packed else "linear"
        return 1 if dict(self._kernels.names)[stem] == "cpu" else TORCH_ROW_MULTIPLE

    def multiply(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out = x @ self.T + bias. x: [T, In] in the model dtype, or fp32 if this is packed."""
        if self.dense is not None:
            self._kernels.linear(x, self.dense, bias, out)
            return
        assert self.packed, "the weights have not been read"
        bits = self._context.activation_bits
        multiply = self._kernels.quantized_linear
        if len(self.packed) == 1:
            multiply(x, self.packed[0].weight, self.packed[0].fmt, bits, bias, out)
            return
        for rows in self.packed:
            own = slice(rows.begin, rows.end)
            own_bias = None if bias is None else bias[own]
            multiply(x, rows.weight, rows.fmt, bits, own_bias, out[:, own])

    def rows(self, indices: Tensor, out: Tensor) -> None:
        """out = the rows of these indices. indices: [T] int64, out: [T, In] fp32."""
        if self.dense is not None:
            self._kernels.embedding(indices, self.dense, out)
            return
        (rows,) = self.packed  # a table of embeddings is one tensor
        self._kernels.quantized_embedding(indices, rows.weight, rows.fmt, out)

    def read(self, begin: int, end: int, tensor: WeightTensor, method: QuantMethod | None) -> None:
        """Read the rows [begin, end)."""
        fmt = method.packed_format(tensor) if method is not None else None
        whole_blocks = begin % COLUMNS == 0 and (end % COLUMNS == 0 or end == self.out_features)
        if method is None or fmt is None or not whole_blocks or self.dense is not None:
            tensor.read_into(self._as_dense()[begin:end])
            return
        rows = PackedRows(begin, end, fmt, self._weight(fmt, begin, end))
        method.pack_into(tensor, rows.weight)
        self._add(rows)

    def _weight(self, fmt: PackedFormat, begin: int, end: int) -> Tensor:
        """Memory for these rows, behind that of the rows before them if they have this format.

        There is a place for all rows in each format: what is never written takes no memory.
        """
        if fmt not in self._whole:
            shape = fmt.shape(self.out_features, self.in_features)
            self._whole[fmt] = self._context.parameter(*shape, dtype=torch.uint8)
        return self._whole[fmt][begin // COLUMNS : -(-end // COLUMNS)]

    def _add(self, rows: PackedRows) -> None:
        joined: list[PackedRows] = []
        for right in sorted([*self.packed, rows], key=lambda rows: rows.begin):
            left = joined[-1] if joined else None
            if left is not None and left.end == right.begin and left.fmt == right.fmt:
                left.end = right.end
                left.weight = self._weight(left.fmt, left.begin, left.end)
            else:
                joined.append(right)
        self.packed = joined
        self.packed_weights = nn.ParameterList(
            nn.Parameter(rows.weight, requires_grad=False) for rows in joined
        )

    def _as_dense(self) -> Tensor:
        """The dense parameter, which takes over what has been packed already."""
        if self.dense is None:
            shape = (self.out_features, self.in_features)
            self.dense = self._context.parameter(*shape)
            for rows in self.packed:
                unpacked = unpack(rows.weight, rows.fmt)[: rows.end - rows.begin]
                self.dense[rows.begin : rows.end] = unpacked
            self.packed, self.packed_weights, self._whole = [], nn.ParameterList(), {}
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
