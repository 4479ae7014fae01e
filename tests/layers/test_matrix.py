"""A matrix is packed if all of its tensors can be, each in its format, and dense otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.layers.context import LayerContext
from headrace.layers.matrix import Matrix
from headrace.layers.stored_rows import Rows
from headrace.quantization.method import Format, ScaledFormat
from headrace_kernels.dispatch import KernelFacts, choose
from headrace_kernels.packed_format import PackedFormat
from headrace_kernels.testing import random_packed

INNER = 128
Q4, Q8, Q6_K = PackedFormat(4, True), PackedFormat(8, False), PackedFormat(8, False, 16)
INT8, E4M3, BLOCKS = ScaledFormat("int8"), ScaledFormat("e4m3"), ScaledFormat("e4m3", True)


@dataclass
class Part:
    """A tensor whose stored form is known, if it has one."""

    name: str
    stored: tuple[Tensor, ...]
    dense: Tensor
    fmt: Format | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dense.shape)

    def read_into(self, out: Tensor) -> None:
        out.copy_(self.dense)


class Method:
    def format_of(self, tensor: Any) -> Format | None:
        fmt: Format | None = tensor.fmt
        return fmt

    def read(self, tensor: Any, fmt: Format, into: tuple[Tensor, ...]) -> None:
        assert fmt == tensor.fmt
        for target, stored in zip(into, tensor.stored, strict=True):
            target.copy_(stored)


def part(rows: int, fmt: Format | None) -> Part:
    if fmt is None:
        return Part("w", (), torch.randn(rows, INNER), None)
    if isinstance(fmt, PackedFormat):
        packed, dense = random_packed(fmt, rows, INNER)
        return Part("w", (packed,), dense.float(), fmt)
    dtype = torch.int8 if fmt.dtype == "int8" else torch.float8_e4m3fn
    weight = (20 * torch.randn(rows, INNER)).to(dtype)
    scale = 0.05 * torch.rand(fmt.scale_shape(rows, INNER))
    of_rows = scale
    if fmt.of_blocks:
        of_rows = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
    return Part("w", (weight, scale), weight.float() * of_rows, fmt)


def read(
    parts: list[Part], method: Method | None, order: int = 1, activation_bits: int = 8
) -> tuple[Matrix, Tensor]:
    """The matrix of these parts, read in this order, and what it should hold."""
    facts = KernelFacts(device="cpu", arch="", dtype=torch.float32, head_dim=64, page_size=16)
    dense = torch.cat([p.dense for p in parts])
    context = LayerContext(
        dtype=torch.float32,
        device=torch.device("cpu"),
        kernels=choose(facts),
        activation_bits=activation_bits,
    )
    matrix = Matrix(*dense.shape, context)
    begin = 0
    slots = []
    for p in parts:
        slots.append((matrix.slot(begin, len(p.dense)), p))
        begin += len(p.dense)
    for slot, p in slots[::order]:
        assert slot.shape == p.shape
        slot.read(p, method)
    return matrix, dense


@pytest.mark.parametrize(
    ("parts", "products"),
    [
        ([(40, Q4)], 1),
        ([(32, Q4), (16, Q4), (9, Q4)], 1),
        ([(32, Q8), (20, Q8)], 1),
        ([(32, Q4), (16, Q8)], 2),
        ([(32, Q4), (16, Q8), (20, Q4)], 3),
        ([(32, Q4), (16, Q4), (20, Q8)], 2),
        ([(32, Q4), (48, Q6_K), (20, Q6_K)], 2),
        ([(20, Q4), (32, Q4)], 0),  # a block of both
        ([(32, Q4), (16, None)], 0),
        ([(32, None), (16, Q4)], 0),
        ([(20, INT8), (33, INT8), (1, INT8)], 1),
        ([(20, E4M3), (33, E4M3)], 1),
        ([(128, BLOCKS), (200, BLOCKS)], 1),
        ([(128, BLOCKS), (16, E4M3), (32, Q4)], 3),
        ([(100, BLOCKS), (128, BLOCKS)], 0),  # a block of both
        ([(20, E4M3), (16, None)], 0),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_packed_or_dense(
    parts: list[tuple[int, Format | None]], products: int, order: int, activation_bits: int
) -> None:
    matrix, dense = read([part(*p) for p in parts], Method(), order, activation_bits)
    assert len(matrix.stored) == products
    assert (matrix.dense is None) == (products > 0)
    tensors = sum(len(rows.tensors) for rows in matrix.stored)
    assert len(list(matrix.parameters())) == max(tensors, 1)
    x, bias = torch.randn(3, INNER), torch.randn(len(dense))
    out = torch.full((3, len(dense)), torch.nan)
    matrix.multiply(Rows(x), bias, out)
    relative_error = (out - x @ dense.T - bias).norm() / out.norm()
    formats = {rows.fmt for rows in matrix.stored}
    allowed = 1e-5 if products == 0 else 0.02 if activation_bits == 8 else 0.005
    if any(isinstance(fmt, ScaledFormat) for fmt in formats):
        allowed = 0.01 if formats == {INT8} else 0.04  # 3 bits of mantissa
    assert relative_error < allowed
    if products < 2 and not any(isinstance(fmt, ScaledFormat) for fmt in formats):
        looked_up = torch.full_like(dense, torch.nan)
        matrix.rows(torch.arange(len(dense)), looked_up)
        torch.testing.assert_close(looked_up, dense, atol=1e-5, rtol=1e-5)


def test_memory_is_counted_once() -> None:
    matrix, _ = read([part(32, Q4), part(48, Q8)], Method())
    nbytes = Q4.nbytes(32, INNER) + Q8.nbytes(48, INNER)
    assert sum(p.nbytes for p in matrix.parameters()) == nbytes


def test_without_a_method_all_is_dense() -> None:
    matrix, dense = read([part(32, Q4), part(9, Q4)], None)
    assert not matrix.stored and matrix.dense is not None
    assert torch.equal(matrix.dense, dense)


def test_rows_that_are_looked_up_are_not_kept_for_products_only() -> None:
    context = read([part(1, None)], None)[0]._context
    table, stored = Matrix(20, INNER, context, is_table=True), part(20, E4M3)
    table.slot().read(stored, Method())
    assert table.dense is not None and torch.equal(table.dense, stored.dense)
