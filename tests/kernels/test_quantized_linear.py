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

Q4_MINIMUM = PackedFormat(4, True)

PRODUCTS = [(f, bits) for f in FORMATS for bits in (8, 16) if bits == 16 or f.scale_bits == 16]


def name(value: object) -> str:
    if not isinstance(value, PackedFormat):
        return f"{value} bits of x"
    minimum = " and minimum" * value.has_minimum
    return f"{value.bits} bits{minimum}, fp{value.scale_bits} per {value.inputs_per_scale}"


any_format = pytest.mark.parametrize("fmt", FORMATS, ids=name)
any_product = pytest.mark.parametrize(("fmt", "activation_bits"), PRODUCTS, ids=name)


def activations(rows: int, inner: int) -> Tensor:
    """Rows of different sizes and means, one of them zero, with a large channel."""
    x = torch.randn(rows, inner) * torch.rand(rows, 1) * 3 + torch.randn(rows, 1)
    x[:, 5] *= 50
    x[rows // 2] *= rows == 1
    return x


def exact_product(x: Tensor, dense: Tensor, bias: Tensor | None, activation_bits: int) -> Tensor:
    """What the op's definition gives, in float64."""
    if activation_bits == 8:
        integers, scale = quantize_activations(x)
        rounded = (integers.double() * scale.double()).flatten(1)
    else:
        rounded = x.bfloat16().double()
    product = rounded @ dense.T
    return product if bias is None else product + bias.double()


def tolerance(dtype: torch.dtype, expected: Tensor) -> Tolerance:
    """Sums of products cancel: the error is relative to the larger results."""
    own = TOLERANCES["quantized_linear", dtype]
    size = max(1.0, float(expected.abs().max()))
    return Tolerance(own.absolute * size, own.relative, own.reason)


@any_product
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(
    shape: tuple[int, int, int],
    fmt: PackedFormat,
    activation_bits: int,
    dtype: torch.dtype,
    implementation: str,
) -> None:
    rows, inner, outer = shape
    x, (packed, dense) = activations(rows, inner).to(dtype), random_packed(fmt, outer, inner)
    for bias in (None, torch.randn(outer).to(dtype)):
        expected = exact_product(x, dense, bias, activation_bits)
        for out_dtype in (dtype, torch.float32):
            out = poisoned(rows, outer, dtype=out_dtype)
            quantized_linear(x, packed, fmt, bias, out=out, activation_bits=activation_bits)
            assert_close(out, expected, tolerance(out_dtype, expected))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.scale_bits == 16], ids=name)
def test_every_instruction_set_gives_the_same_bits(fmt: PackedFormat, isa: str) -> None:
    x, (packed, _) = activations(17, 576), random_packed(fmt, 50, 576)
    out = quantized_linear(x, packed, fmt, out=poisoned(17, 50))
    native.set_cpu_isa("scalar")
    assert torch.equal(out, quantized_linear(x, packed, fmt, out=poisoned(17, 50)))


@any_product
def test_a_row_depends_on_itself_only(
    fmt: PackedFormat, activation_bits: int, isa: str, threads: int
) -> None:
    inner = 928  # of which 24 or 32 groups are unpacked at a time
    x, (packed, _) = activations(300, inner), random_packed(fmt, 50, inner)
    bias = torch.randn(50)

    def product(first: int, last: int) -> Tensor:
        out = poisoned(last - first, 50)
        rows = x[first:last]
        return quantized_linear(rows, packed, fmt, bias, out=out, activation_bits=activation_bits)

    whole = product(0, 300)
    for first, last in ((0, 1), (1, 3), (3, 8), (8, 15), (15, 46), (46, 300)):
        assert torch.equal(product(first, last), whole[first:last])


def test_no_rows(implementation: str) -> None:
    packed, _ = random_packed(Q4_MINIMUM, 20, 64)
    assert quantized_linear(
        torch.empty(0, 64), packed, Q4_MINIMUM, out=torch.empty(0, 20)
    ).shape == (0, 20)


def test_rows_of_wider_tensors(implementation: str) -> None:
    fmt = PackedFormat(4, False)
    x, (packed, dense) = activations(5, 96), random_packed(fmt, 24, 64)
    for bits in (8, 16):
        wide = poisoned(5, 50)
        quantized_linear(x[:, 32:], packed, fmt, out=wide[:, 10:34], activation_bits=bits)
        expected = exact_product(x[:, 32:], dense, None, bits)
        assert_close(wide[:, 10:34], expected, tolerance(torch.float32, expected))
        assert wide[:, :10].isnan().all() and wide[:, 34:].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_only(bad: float, implementation: str) -> None:
    x, (packed, _) = activations(4, 64), random_packed(Q4_MINIMUM, 20, 64)
    dirty = x.clone()
    dirty[1, 40] = bad
    for bits in (8, 16):
        clean, out = (
            quantized_linear(value, packed, Q4_MINIMUM, out=poisoned(4, 20), activation_bits=bits)
            for value in (x, dirty)
        )
        assert not out[1].isfinite().any()
        assert bits == 16 or out[1].isnan().all()
        keep = [0, 2, 3]
        assert torch.equal(out[keep], clean[keep])


def test_tiny_activations_are_zero(implementation: str) -> None:
    packed, _ = random_packed(Q4_MINIMUM, 20, 64)
    out = quantized_linear(torch.full((2, 64), 1e-36), packed, Q4_MINIMUM, out=poisoned(2, 20))
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
    # With a scale of 24 bits the product is rounded too, before the minimum may cancel it.
    rounding = 2**-22 if fmt.scale_bits == 32 else 0
    limit = Tolerance(rounding, 2**-22, "a product and a sum")
    assert_close(unpack(packed, fmt)[:100], dense, limit)
    ids = torch.tensor([0, 99, 15, 16, 15])
    assert torch.equal(quantized_embedding(ids, packed, fmt), unpack_rows(packed, fmt, ids))
    assert quantized_embedding(ids[:0], packed, fmt).shape == (0, 96)


def test_missing_rows_of_the_last_block_are_zeros() -> None:
    packed, _ = random_packed(Q4_MINIMUM, 20, 64)
    assert (unpack(packed, Q4_MINIMUM)[20:] == 0).all()


def test_opcheck(isa: str) -> None:
    from headrace_kernels.cpu.quantized_linear import scratch_bytes  # needs the native kernels

    fmt = PackedFormat(8, False)
    packed, _ = random_packed(fmt, 20, 64)
    x, bias = torch.randn(3, 64), torch.randn(20)
    ops = torch.ops.headrace
    for bits in (8, 16):
        scratch = torch.empty(scratch_bytes(3, 64, fmt, bits), dtype=torch.uint8)
        arguments = (x, packed, fmt.code, bits, bias, scratch, torch.zeros(3, 20))
        torch.library.opcheck(ops.quantized_linear, arguments)
    ids = torch.tensor([3, 19])
    torch.library.opcheck(ops.quantized_embedding, (ids, packed, fmt.code, torch.zeros(2, 64)))


def test_wrong_arguments_are_named(implementation: str) -> None:
    packed, _ = random_packed(Q4_MINIMUM, 20, 64)
    x, out = torch.randn(2, 64), torch.empty(2, 20)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 64\), not \(2, 63\)"):
        quantized_linear(x[:, 1:], packed, Q4_MINIMUM, out=out)
    with pytest.raises(ValueError, match="out has 33 columns, but weight has 2 blocks of 16"):
        quantized_linear(x, packed, Q4_MINIMUM, out=torch.empty(2, 33))
    with pytest.raises(ValueError, match=r"bias must have shape \(20,\), not \(21,\)"):
        quantized_linear(x, packed, Q4_MINIMUM, torch.zeros(21), out=out)
    with pytest.raises(ValueError, match=r"In / 32, 320\], not torch.uint8"):
        quantized_linear(x, packed[..., 1:], Q4_MINIMUM, out=out)
    with pytest.raises(ValueError, match="fmt must be one of packed_format.FORMATS"):
        quantized_linear(x, packed, PackedFormat(5, True), out=out)
    with pytest.raises(ValueError, match="activation_bits must be 8, .* or 16, not 4"):
        quantized_linear(x, packed, Q4_MINIMUM, out=out, activation_bits=4)
    with pytest.raises(ValueError, match="not 8 for scales of 32 bits"):
        wide = PackedFormat(4, True, scale_bits=32)
        quantized_linear(x, random_packed(wide, 20, 64)[0], wide, out=out)
    with pytest.raises(ValueError, match="token_ids must be int64"):
        quantized_embedding(torch.tensor([0.5]), packed, Q4_MINIMUM)


def test_codes_tell_formats_apart() -> None:
    assert len({fmt.code for fmt in FORMATS}) == len(FORMATS)


def test_the_kernel_refuses_what_it_has_no_product_for(isa: str) -> None:
    packed, _ = random_packed(Q4_MINIMUM, 20, 64)
    x, out, scratch = torch.randn(2, 64), torch.empty(2, 20), torch.empty(999, dtype=torch.uint8)
    op = torch.ops.headrace.quantized_linear
    with pytest.raises(RuntimeError, match="there is no packed format 5"):
        op(x, packed, 5, 8, None, scratch, out)
    with pytest.raises(RuntimeError, match="weight must be packed"):
        op(x, packed, 4, 8, None, scratch, out)
    with pytest.raises(RuntimeError, match="activation_bits must be 8"):
        op(x, packed, Q4_MINIMUM.code, 4, None, scratch, out)


@pytest.mark.parametrize("token", [-1, 32])
def test_a_token_outside_of_the_table_is_refused(token: int, isa: str) -> None:
    packed, _ = random_packed(Q4_MINIMUM, 20, 64)
    with pytest.raises(RuntimeError, match=rf"token id {token} is not in \[0, 32\)"):
        quantized_embedding(torch.tensor([token]), packed, Q4_MINIMUM)
