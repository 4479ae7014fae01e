"""Products of packed weights: against float64, on the reference and every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace_kernels import native
from headrace_kernels.ops.quantized_linear import quantized_embedding, quantized_linear
from headrace_kernels.packed_format import FORMATS, PackedFormat
from headrace_kernels.packed_weight import unpack, unpack_rows
from headrace_kernels.reference.quantized_linear import quantize_activations
from headrace_kernels.testing import TOLERANCES, Tolerance, assert_close, poisoned, random_packed

SHAPES = [(1, 32, 16), (3, 64, 40), (13, 576, 100), (25, 96, 7), (64, 160, 65)]
"""(T, In, Out): tiles of every height, blocks that are not full."""

any_format = pytest.mark.parametrize(
    "fmt", FORMATS.values(), ids=lambda f: f"{f.bits} bits{' and minimum' * f.has_minimum}"
)


def activations(rows: int, inner: int) -> Tensor:
    """Rows of different sizes and means, one of them zero, with a large channel."""
    x = torch.randn(rows, inner) * torch.rand(rows, 1) * 3 + torch.randn(rows, 1)
    x[:, 5] *= 50
    x[rows // 2] *= rows == 1
    return x


def exact_product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    """What the op's definition gives, in float64."""
    integers, scale = quantize_activations(x)
    product = (integers.double() * scale.double()).flatten(1) @ dense.T
    return product if bias is None else product + bias.double()


def tolerance(dtype: torch.dtype, expected: Tensor) -> Tolerance:
    """Sums of products cancel: the error is relative to the larger results."""
    own = TOLERANCES["quantized_linear", dtype]
    size = max(1.0, float(expected.abs().max()))
    return Tolerance(own.absolute * size, own.relative, own.reason)


@any_format
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(
    shape: tuple[int, int, int], fmt: PackedFormat, dtype: torch.dtype, implementation: str
) -> None:
    rows, inner, outer = shape
    x, (packed, dense) = activations(rows, inner).to(dtype), random_packed(fmt, outer, inner)
    for bias in (None, torch.randn(outer).to(dtype)):
        expected = exact_product(x, dense, bias)
        for out_dtype in (dtype, torch.float32):
            out = poisoned(rows, outer, dtype=out_dtype)
            quantized_linear(x, packed, bias, out=out)
            assert_close(out, expected, tolerance(out_dtype, expected))


@any_format
def test_every_instruction_set_gives_the_same_bits(fmt: PackedFormat, isa: str) -> None:
    x, (packed, _) = activations(17, 576), random_packed(fmt, 50, 576)
    out = quantized_linear(x, packed, out=poisoned(17, 50))
    native.set_cpu_isa("scalar")
    assert torch.equal(out, quantized_linear(x, packed, out=poisoned(17, 50)))


@any_format
def test_a_row_depends_on_itself_only(fmt: PackedFormat, isa: str, threads: int) -> None:
    x, (packed, _) = activations(61, 192), random_packed(fmt, 330, 192)
    bias = torch.randn(330)
    whole = quantized_linear(x, packed, bias, out=poisoned(61, 330))
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 31), (31, 61)):
        part = quantized_linear(x[first:last], packed, bias, out=poisoned(last - first, 330))
        assert torch.equal(part, whole[first:last])


def test_no_rows(implementation: str) -> None:
    packed, _ = random_packed(PackedFormat(4, True), 20, 64)
    assert quantized_linear(torch.empty(0, 64), packed, out=torch.empty(0, 20)).shape == (0, 20)


def test_rows_of_wider_tensors(implementation: str) -> None:
    x, (packed, dense) = activations(5, 96), random_packed(PackedFormat(4, False), 24, 64)
    wide = poisoned(5, 50)
    quantized_linear(x[:, 32:], packed, out=wide[:, 10:34])
    expected = exact_product(x[:, 32:], dense, None)
    assert_close(wide[:, 10:34], expected, tolerance(torch.float32, expected))
    assert wide[:, :10].isnan().all() and wide[:, 34:].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_only(bad: float, implementation: str) -> None:
    x, (packed, _) = activations(4, 64), random_packed(PackedFormat(4, True), 20, 64)
    clean = quantized_linear(x, packed, out=poisoned(4, 20))
    x[1, 40] = bad
    out = quantized_linear(x, packed, out=poisoned(4, 20))
    assert out[1].isnan().all()
    keep = [0, 2, 3]
    assert torch.equal(out[keep], clean[keep])


def test_tiny_activations_are_zero(implementation: str) -> None:
    packed, _ = random_packed(PackedFormat(4, True), 20, 64)
    out = quantized_linear(torch.full((2, 64), 1e-36), packed, out=poisoned(2, 20))
    assert (out == 0).all()


def test_activations_are_rounded_to_the_nearest_of_256_values() -> None:
    x = activations(40, 64)
    integers, scale = quantize_activations(x)
    assert integers.abs().max() <= 255 and integers.frac().eq(0).all()
    error = (integers * scale - x.view(40, 2, 32)).abs()
    assert (error <= 0.5001 * scale + 1e-30).all()


@any_format
def test_embedding_and_unpacking(fmt: PackedFormat, implementation: str) -> None:
    packed, dense = random_packed(fmt, 100, 96)
    assert_close(unpack(packed)[:100], dense, Tolerance(0, 2**-22, "a product and a sum"))
    ids = torch.tensor([0, 99, 15, 16, 15])
    assert torch.equal(quantized_embedding(ids, packed), unpack_rows(packed, ids))
    assert quantized_embedding(ids[:0], packed).shape == (0, 96)


def test_missing_rows_of_the_last_block_are_zeros() -> None:
    packed, _ = random_packed(PackedFormat(4, True), 20, 64)
    assert (unpack(packed)[20:] == 0).all()


def test_opcheck(isa: str) -> None:
    packed, _ = random_packed(PackedFormat(8, False), 20, 64)
    scratch = torch.empty((3, 2, 44), dtype=torch.uint8)
    ops = torch.ops.headrace
    arguments = (torch.randn(3, 64), packed, torch.randn(20), scratch, torch.zeros(3, 20))
    torch.library.opcheck(ops.quantized_linear, arguments)
    ids = torch.tensor([3, 19])
    torch.library.opcheck(ops.quantized_embedding, (ids, packed, torch.zeros(2, 64)))


def test_wrong_arguments_are_named(implementation: str) -> None:
    packed, _ = random_packed(PackedFormat(4, True), 20, 64)
    x, out = torch.randn(2, 64), torch.empty(2, 20)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 64\), not \(2, 63\)"):
        quantized_linear(x[:, 1:], packed, out=out)
    with pytest.raises(ValueError, match="out has 33 columns, but weight has 2 blocks of 16"):
        quantized_linear(x, packed, out=torch.empty(2, 33))
    with pytest.raises(ValueError, match=r"bias must have shape \(20,\), not \(21,\)"):
        quantized_linear(x, packed, torch.zeros(21), out=out)
    with pytest.raises(ValueError, match="one of 288, 320, 544, 576, not torch.uint8"):
        quantized_linear(x, packed[..., 1:], out=out)
    with pytest.raises(ValueError, match="token_ids must be int64"):
        quantized_embedding(torch.tensor([0.5]), packed)


@pytest.mark.parametrize("token", [-1, 32])
def test_a_token_outside_of_the_table_is_refused(token: int, isa: str) -> None:
    packed, _ = random_packed(PackedFormat(4, True), 20, 64)
    with pytest.raises(RuntimeError, match=rf"token id {token} is not in \[0, 32\)"):
        quantized_embedding(torch.tensor([token]), packed)
