"""Rows of a matrix in the 8- or 4-bit form in which they are kept, and products with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.layers.context import LayerContext
from headrace.quantization.method import BLOCK, Format
from headrace_kernels.packed_format import COLUMNS, PackedFormat
from headrace_kernels.packed_weight import unpack

DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Rows:
    """Activations [T, In]: values as they are, or of 8 bits beside scales [T, G] in fp32."""

    values: Tensor
    scale: Tensor | None = None


@dataclass(slots=True)
class StoredRows:
    """Rows of a matrix that are stored alike; they begin and end with a unit of their format."""

    begin: int
    end: int
    fmt: Format
    tensors: tuple[Tensor, ...]
    """Of these rows alone: the packed weight, or 8-bit rows and their scales."""

    def multiply(self, x: Rows, bias: Tensor | None, out: Tensor, context: LayerContext) -> None:
        """out = x @ self.T + bias."""
        if isinstance(self.fmt, PackedFormat):
            assert x.scale is None, "packed weights take activations as they are"
            bits = context.activation_bits
            context.kernels.quantized_linear(x.values, self.tensors[0], self.fmt, bits, bias, out)
            return
        if x.scale is None:
            x = quantized(x.values, self.fmt, context)
        assert x.scale is not None
        weight, scale = self.tensors
        context.kernels.scaled_linear(x.values, x.scale, weight, scale, bias, out)

    def dequantized(self) -> Tensor:
        """[rows, In] float32."""
        count = self.end - self.begin
        if isinstance(self.fmt, PackedFormat):
            return unpack(self.tensors[0], self.fmt)[:count]
        weight, scale = self.tensors
        if self.fmt.of_blocks:
            scale = scale.repeat_interleave(BLOCK, 0)[:count].repeat_interleave(BLOCK, 1)
        return weight.float() * scale


def rows_per_unit(fmt: Format) -> int:
    """Rows of a matrix that cannot be told apart in its tensors."""
    if isinstance(fmt, PackedFormat):
        return COLUMNS
    return BLOCK if fmt.of_blocks else 1


def allocate(
    fmt: Format, out_features: int, in_features: int, context: LayerContext
) -> tuple[Tensor, ...]:
    """Memory for a whole matrix in a form."""
    if isinstance(fmt, PackedFormat):
        shape = fmt.shape(out_features, in_features)
        return (context.parameter(*shape, dtype=torch.uint8),)
    weight = context.parameter(out_features, in_features, dtype=DTYPES[fmt.dtype])
    scale_shape = fmt.scale_shape(out_features, in_features)
    return weight, context.parameter(*scale_shape, dtype=torch.float32)


def part_of(whole: tuple[Tensor, ...], fmt: Format, begin: int, end: int) -> tuple[Tensor, ...]:
    """The part of the rows [begin, end), which begin with a unit, and end with one or all rows."""
    unit = rows_per_unit(fmt)
    units = slice(begin // unit, -(-end // unit))
    if isinstance(fmt, PackedFormat):
        return (whole[0][units],)
    return whole[0][begin:end], whole[1][units]


def new_rows(
    name: str,
    count: int,
    width: int,
    fmt: Format | None,
    context: LayerContext,
    *,
    dtype: torch.dtype | None = None,
) -> Rows:
    """Memory for activations in the form that products with weights in the form `fmt` take.

    Those without a form of their own are in `dtype`, by default the model's.
    """
    if fmt is None or isinstance(fmt, PackedFormat):
        return Rows(context.activations(name, count, width, dtype=dtype))
    groups = width // BLOCK if fmt.of_blocks else 1
    values = context.activations(name, count, width, dtype=DTYPES[fmt.dtype])
    scale = context.activations(f"scale of {name}", count, groups, dtype=torch.float32)
    return Rows(values, scale)


def quantized(x: Tensor, fmt: Format, context: LayerContext) -> Rows:
    """Activations [T, In] in the form that products with weights in the form `fmt` take."""
    rows = new_rows("quantized", len(x), x.shape[1], fmt, context)
    assert rows.scale is not None
    context.kernels.quantize_rows(x, rows.values, rows.scale)
    return rows
