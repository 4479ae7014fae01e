"""Matrix: the weight of linear layers, embedding and head, dense or as its tensors are stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from headrace.layers.context import LayerContext
from headrace.layers.stored_rows import Rows, StoredRows, allocate, part_of, rows_per_unit
from headrace.layers.weights import WeightTensor
from headrace.quantization.method import Format, QuantMethod, ScaledFormat
from headrace_kernels.packed_format import PackedFormat

TORCH_ROW_MULTIPLE = 8
"""The last rows of a product by torch, beyond a multiple of this, are computed in another order."""
INVARIANT_KERNELS = ("cpu", "triton")
"""Those of products whose rows need no padding: their order does not depend on the rows."""


class Matrix(nn.Module):
    """[Out, In]: in the model dtype, or integers in packed form, or 8-bit rows with scales.

    Which of them it is shows when its tensors are read, and memory is taken then. Rows of several
    tensors are kept as they are, each in its own format, if all of them can be and begin and end
    with a unit of it. Neighbours of one format are one product.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        context: LayerContext,
        *,
        is_table: bool = False,
    ) -> None:
        """`is_table`: its rows are looked up, so that they are not kept for products only."""
        super().__init__()
        self._is_table = is_table
        self.out_features, self.in_features = out_features, in_features
        self.dense: nn.Parameter | None = None
        self.stored: list[StoredRows] = []
        self.stored_tensors = nn.ParameterList()
        self.input_format: Format | None = None
        """Of activations that need no conversion: see stored_rows.new_rows."""
        self._whole: dict[Format, tuple[Tensor, ...]] = {}
        self._context = context
        self._kernels = context.kernels

    def slot(self, begin: int = 0, rows: int | None = None) -> MatrixSlot:
        """Where the tensor of rows [begin, begin + rows) is read into; of all by default."""
        return MatrixSlot(self, begin, self.out_features if rows is None else rows)

    @property
    def stems(self) -> set[str]:
        """Of the ops that its products are."""
        packed = {isinstance(rows.fmt, PackedFormat) for rows in self.stored}
        return {"quantized_linear" if own else "scaled_linear" for own in packed} or {"linear"}

    @property
    def row_multiple(self) -> int:
        """What the rows of `x` are padded to, so that the bits of each depend on that row only."""
        chosen = dict(self._kernels.names)
        invariant = all(chosen[stem] in INVARIANT_KERNELS for stem in self.stems)
        return 1 if invariant else TORCH_ROW_MULTIPLE

    def multiply(self, x: Rows, bias: Tensor | None, out: Tensor) -> None:
        """out = x @ self.T + bias. x: [T, In] in the model dtype, in fp32, or as input_format."""
        if self.dense is not None:
            self._kernels.linear(x.values, self.dense, bias, out)
            return
        assert self.stored, "the weights have not been read"
        if len(self.stored) == 1:
            self.stored[0].multiply(x, bias, out, self._context)
            return
        for rows in self.stored:
            own = slice(rows.begin, rows.end)
            own_bias = None if bias is None else bias[own]
            rows.multiply(x, own_bias, out[:, own], self._context)

    def rows(self, indices: Tensor, out: Tensor) -> None:
        """out = the rows of these indices. indices: [T] int64, out: [T, In] fp32."""
        if self.dense is not None:
            self._kernels.embedding(indices, self.dense, out)
            return
        (rows,) = self.stored  # a table of embeddings is one tensor
        assert isinstance(rows.fmt, PackedFormat)
        self._kernels.quantized_embedding(indices, rows.tensors[0], rows.fmt, out)

    def read(self, begin: int, end: int, tensor: WeightTensor, method: QuantMethod | None) -> None:
        """Read the rows [begin, end)."""
        fmt = method.format_of(tensor) if method is not None else None
        if self._is_table and isinstance(fmt, ScaledFormat):
            fmt = None
        if method is None or fmt is None or self.dense is not None:
            tensor.read_into(self._as_dense()[begin:end])
            return
        unit = rows_per_unit(fmt)
        if begin % unit or (end % unit and end != self.out_features):
            tensor.read_into(self._as_dense()[begin:end])
            return
        rows = StoredRows(begin, end, fmt, self._part(fmt, begin, end))
        method.read(tensor, fmt, rows.tensors)
        self._add(rows)

    def _part(self, fmt: Format, begin: int, end: int) -> tuple[Tensor, ...]:
        """Memory for these rows, behind that of the rows before them if they have this format."""
        if fmt not in self._whole:
            self._whole[fmt] = allocate(fmt, self.out_features, self.in_features, self._context)
        return part_of(self._whole[fmt], fmt, begin, end)

    def _add(self, rows: StoredRows) -> None:
        joined: list[StoredRows] = []
        for right in sorted([*self.stored, rows], key=lambda rows: rows.begin):
            left = joined[-1] if joined else None
            if left is not None and left.end == right.begin and left.fmt == right.fmt:
                left.end = right.end
                left.tensors = self._part(left.fmt, left.begin, left.end)
            else:
                joined.append(right)
        if len(joined) > 1 and sum(rows.end - rows.begin for rows in joined) == self.out_features:
            self._drop_what_is_unused(joined)
        self.stored = joined
        self.input_format = joined[0].fmt if len(joined) == 1 else None
        self.stored_tensors = nn.ParameterList(
            nn.Parameter(tensor, requires_grad=False) for rows in joined for tensor in rows.tensors
        )

    def _drop_what_is_unused(self, complete: list[StoredRows]) -> None:
        """There was a place for all rows in each format. On a CPU that takes no memory."""
        if self._context.device.type != "cpu":
            for rows in complete:
                rows.tensors = tuple(tensor.clone() for tensor in rows.tensors)
            self._whole = {}

    def _as_dense(self) -> Tensor:
        """The dense parameter, which takes over what has been read already."""
        if self.dense is None:
            shape = (self.out_features, self.in_features)
            self.dense = self._context.parameter(*shape)
            for rows in self.stored:
                self.dense[rows.begin : rows.end] = rows.dequantized()
            self.stored, self.stored_tensors, self._whole = [], nn.ParameterList(), {}
            self.input_format = None
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
