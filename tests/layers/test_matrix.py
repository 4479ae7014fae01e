"""A matrix is packed if all of its tensors are alike, and dense otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.layers.context import LayerContext
from headrace.layers.matrix import Matrix
from headrace_kernels.dispatch import KernelFacts, choose
from headrace_kernels.packed_format import PackedFormat
from headrace_kernels.testing import random_packed

INNER = 64
Q4, Q8 = PackedFormat(4, True), PackedFormat(8, False)


@dataclass
class Part:
    """A tensor whose packed form is known, or None."""

    name: str
    packed: Tensor | None
    dense: Tensor
    fmt: PackedFormat | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dense.shape)

    def read_into(self, out: Tensor) -> None:
        out.copy_(self.dense)


class Method:
    def packed_format(self, tensor: Any) -> PackedFormat | None:
        fmt: PackedFormat | None = tensor.fmt
        return fmt

    def pack_into(self, tensor: Any, packed: Tensor) -> None:
        packed.copy_(tensor.packed)


def part(rows: int, fmt: PackedFormat | None) -> Part:
    if fmt is None:
        return Part("w", None, torch.randn(rows, INNER), None)
    packed, dense = random_packed(fmt, rows, INNER)
    return Part("w", packed, dense.float(), fmt)


def read(parts: list[Part], method: Method | None) -> tuple[Matrix, Tensor]:
    """The matrix of these parts, and what it should hold."""
    facts = KernelFacts(device="cpu", arch="", dtype=torch.float32, head_dim=64, page_size=16)
    dense = torch.cat([p.dense for p in parts])
    context = LayerContext(dtype=torch.float32, device=torch.device("cpu"), kernels=choose(facts))
    matrix = Matrix(*dense.shape, context)
    begin = 0
    for p in parts:
        slot = matrix.slot(begin, len(p.dense))
        assert slot.shape == p.shape
        slot.read(p, method)
        begin += len(p.dense)
    return matrix, dense


@pytest.mark.parametrize(
    ("parts", "is_packed"),
    [
        ([(40, Q4)], True),
        ([(32, Q4), (16, Q4), (9, Q4)], True),
        ([(32, Q8), (20, Q8)], True),
        ([(20, Q4), (32, Q4)], False),  # a block of both
        ([(32, Q4), (16, Q8)], False),
        ([(32, Q4), (16, None)], False),
        ([(32, None), (16, Q4)], False),
    ],
)
def test_packed_or_dense(parts: list[tuple[int, PackedFormat | None]], is_packed: bool) -> None:
    matrix, dense = read([part(*p) for p in parts], Method())
    assert (matrix.packed is not None) == is_packed
    assert (matrix.dense is None) == is_packed
    assert len(list(matrix.parameters())) == 1
    rows = torch.arange(len(dense))
    looked_up = torch.full_like(dense, torch.nan)
    matrix.rows(rows, looked_up)
    torch.testing.assert_close(looked_up, dense, atol=1e-5, rtol=1e-5)
    x, out = torch.randn(3, INNER), torch.empty(3, len(dense))
    matrix.multiply(x, None, out)
    relative_error = (out - x @ dense.T).norm() / out.norm()
    assert relative_error < (0.02 if is_packed else 1e-5)


def test_without_a_method_all_is_dense() -> None:
    matrix, dense = read([part(32, Q4), part(9, Q4)], None)
    assert matrix.packed is None and matrix.dense is not None
    assert torch.equal(matrix.dense, dense)
