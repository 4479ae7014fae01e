"""The CUDA kernel of packed products, run on the host, against the products in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from tests.kernels.cuda_host import SCHEDULES, SHARED_LIMIT, library, pointer
from torch import Tensor

from headrace_kernels.cuda.quantized_linear import FORMATS as OURS
from headrace_kernels.packed_format import FORMATS, GROUP, PackedFormat
from headrace_kernels.testing import TOLERANCES, Tolerance, assert_close, random_packed


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "partials")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("groups", "outputs", "code", "tiles", "splits")),
        ("bias_is_bf16", ctypes.c_int),
        ("out_is_bf16", ctypes.c_int),
    )


def product(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    outputs: int,
    *,
    tiles: int,
    splits: int = 1,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    schedule: int = 0,
) -> Tensor:
    out = torch.full((len(x), outputs), float("nan"), dtype=out_dtype)
    partials = torch.full((8, *out.shape), float("nan"))
    arguments = Arguments(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        partials.data_ptr(),
        len(x),
        weight.shape[1],
        outputs,
        fmt.code,
        tiles,
        splits,
        bias is not None and bias.dtype == torch.bfloat16,
        out_dtype == torch.bfloat16,
    )
    used = library().linear(ctypes.byref(arguments), schedule)
    assert 0 < used <= SHARED_LIMIT
    return out


def tolerance_of(dense: Tensor) -> Tolerance:
    """The sums' roundings grow with what is summed: 32 inputs x 7 deviations, with minima of 16."""
    known = TOLERANCES["quantized_linear", torch.float32]
    return Tolerance(2e-6 * dense.shape[1], known.relative, known.reason)


@pytest.mark.parametrize("fmt", OURS, ids=lambda fmt: str(fmt.code))
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "tiles", "splits"),
    [
        (1, 576, 48, 1, 1),
        (3, 4608, 32, 1, 1),
        (13, 160, 40, 2, 1),
        (9, 32, 16, 2, 1),
        (37, 256, 300, 4, 1),
        (33, 2304, 40, 4, 2),
        (20, 160, 33, 4, 8),
    ],
)
def test_products(
    fmt: PackedFormat, tokens: int, inputs: int, outputs: int, tiles: int, splits: int
) -> None:
    weight, dense = random_packed(fmt, outputs, inputs)
    x = torch.randn(tokens, inputs).bfloat16()
    out = product(x, weight, fmt, outputs, tiles=tiles, splits=splits)
    assert_close(out, x.double() @ dense.t(), tolerance_of(dense))


def test_bias_and_bf16_outputs() -> None:
    fmt = OURS[1]
    weight, dense = random_packed(fmt, 48, 160)
    x, bias = torch.randn(5, 160).bfloat16(), torch.randn(48)
    exact = product(x, weight, fmt, 48, tiles=1)
    for given in (bias, bias.bfloat16()):
        expected = exact + given.float()
        assert torch.equal(product(x, weight, fmt, 48, tiles=1, bias=given), expected)
        for tiles, splits in ((1, 1), (4, 1), (4, 4)):
            rounded = product(
                *(x, weight, fmt, 48),
                tiles=tiles,
                splits=splits,
                bias=given,
                out_dtype=torch.bfloat16,
            )
            assert torch.equal(rounded, expected.bfloat16())


@pytest.mark.parametrize("fmt", OURS, ids=lambda fmt: str(fmt.code))
def test_a_row_has_the_same_bits_in_any_company_and_schedule(fmt: PackedFormat) -> None:
    weight, _ = random_packed(fmt, 48, 1184)
    x = torch.randn(40, 1184).bfloat16()
    expected = product(x, weight, fmt, 48, tiles=4)
    for splits in (2, 8):
        assert torch.equal(product(x, weight, fmt, 48, tiles=4, splits=splits), expected)
    for tiles, rows in ((1, [5]), (1, [36, 5, 0]), (2, list(range(11, 22)))):
        out = product(x[rows].contiguous(), weight, fmt, 48, tiles=tiles)
        assert torch.equal(out, expected[rows])
    few = x[:3].contiguous()
    for schedule in SCHEDULES:
        tiles = 4 if schedule in (1, 5, 7) else 1
        out = product(few, weight, fmt, 48, tiles=tiles, schedule=schedule)
        assert torch.equal(out, expected[:3]), schedule


def test_our_formats_are_those_the_kernel_knows() -> None:
    nothing = torch.zeros(0)
    for fmt in FORMATS:
        arguments = Arguments(*[pointer(nothing)] * 5, 0, 1, GROUP, fmt.code, 1, 1, False, False)
        assert (library().linear(ctypes.byref(arguments), 0) > 0) == (fmt in OURS)
