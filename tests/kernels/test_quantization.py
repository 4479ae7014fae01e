"""Rows of 8 bits: the op, and the ops that write such rows instead of floats."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace_kernels.ops import activation as activation_ops
from headrace_kernels.ops import norm as norm_ops
from headrace_kernels.ops import quantization as ops
from headrace_kernels.reference import activation as reference_activation
from headrace_kernels.reference import norm as reference_norm
from headrace_kernels.reference import quantization as reference
from headrace_kernels.reference.quantization import LIMITS
from headrace_kernels.testing import TOLERANCES, assert_close, poisoned

# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(3, 576, 1), (2, 80, 1), (2, 256, 2), (3, 96, 3), (2, 20, 4), (1, 2500, 1), (2, 6000, 40)]
"""(T, In, G): groups and rows of no power of two, and rows of several programs."""


def implementation(candidate: str, stem: str) -> ModuleType:
    return importlib.import_module(f"headrace_kernels.{candidate}.{stem}")


def spread(*shape: int) -> Tensor:
    """Of many magnitudes, so that small ones are subnormal in 8 bits."""
    return torch.randn(shape) * torch.exp(2 * torch.randn(shape))


def poisoned_rows(
    tokens: int, width: int, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rows = torch.full((tokens, width), 0x7F, dtype=torch.int8).view(dtype)
    return rows, poisoned(tokens, groups)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[0].view(torch.int8), expected[0].view(torch.int8))
    assert torch.equal(actual[1].view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("candidate", ["reference", "triton"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_nearest_values_and_the_scale_of_each_group(
    shape: tuple[int, int, int], dtype: torch.dtype, candidate: str
) -> None:
    tokens, width, groups = shape
    x = spread(tokens, width).half()
    out, scale = poisoned_rows(*shape, dtype)
    implementation(candidate, "quantization").quantize_rows(x, out, scale)
    grouped = x.float().view(tokens, groups, -1)
    largest, limit = grouped.abs().amax(-1), torch.tensor(LIMITS[dtype])
    assert torch.equal(scale, largest / limit)
    levels = torch.arange(-128, 128, dtype=torch.int8).view(dtype).float()
    levels = levels[levels.isfinite() & (levels.abs() <= limit)].sort().values
    wanted = (grouped * (limit / largest)[..., None]).double()
    above = torch.searchsorted(levels.double(), wanted).clamp(1, len(levels) - 1)
    nearest = torch.minimum((levels[above] - wanted).abs(), (levels[above - 1] - wanted).abs())
    assert torch.equal((out.float().view(wanted.shape) - wanted).abs(), nearest)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_makes_the_bytes_of_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Ties to even included, of which there are many among halves of integers."""
    for x in (spread(*shape[:2]), torch.randint(-254, 255, shape[:2]).half() / 2):
        x[:, 0] = 127 if dtype == torch.int8 else 448
        expected, actual = poisoned_rows(*shape, dtype), poisoned_rows(*shape, dtype)
        reference.quantize_rows(x, *expected)
        implementation("triton", "quantization").quantize_rows(x, *actual)
        assert_same(actual, expected)


@pytest.mark.parametrize("candidate", ["reference", "triton"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_what_is_not_finite_and_what_is_zero(dtype: torch.dtype, candidate: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, 0.0], [1.0, nan], [-inf, 1.0], [3e38, -1.0], [1e-40, -0.0]])
    out, scale = poisoned_rows(5, 2, 1, dtype)
    implementation(candidate, "quantization").quantize_rows(x, out, scale)
    assert scale[1:3].isnan().all()
    assert scale[0] == 0
    assert scale[3:].isfinite().all()
    assert out.float().isfinite().all()
    assert not out[0].float().any()
    assert not out[2].float().any()
    assert torch.equal(out[3].float(), torch.tensor([LIMITS[dtype], -0.0]))


@pytest.mark.parametrize("candidate", ["reference", "triton"])
def test_rows_may_lie_apart(candidate: str) -> None:
    wide = torch.randn(4, 100)
    for x in (wide[:, 10:74], torch.randn(64, 4).T):
        actual, expected = (poisoned_rows(4, 64, 2, torch.int8) for _ in range(2))
        implementation(candidate, "quantization").quantize_rows(x, *actual)
        reference.quantize_rows(x.contiguous(), *expected)
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("width", "groups"), [(576, 1), (80, 1), (256, 2), (96, 3), (576, 3)])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_rounds_its_fp32_result(
    residual: bool, width: int, groups: int, dtype: torch.dtype
) -> None:
    """A mean may be added in another order: Triton is held to what it computes itself in fp32."""
    x, stream, weight = torch.randn(3, width).half(), torch.randn(3, width), torch.randn(width)
    for module in (reference_norm, implementation("triton", "norm")):
        floats, streams = poisoned(3, width), (stream.clone(), stream.clone())
        rows = poisoned_rows(3, width, groups, dtype)
        if residual:
            module.add_rms_norm(x, streams[0], weight, 1e-5, floats)
            module.add_rms_norm(x, streams[1], weight, 1e-5, *rows)
        else:
            module.rms_norm(x, weight, 1e-5, floats)
            module.rms_norm(x, weight, 1e-5, *rows)
        assert torch.equal(*streams)
        # The order of a sum may depend on the groups: what it changes, it changes by a step.
        expected = poisoned_rows(3, width, groups, dtype)
        reference.quantize_rows(floats, *expected)
        if module is reference_norm or groups == 1:
            assert_same(rows, expected)
        else:
            assert_close(rows[1], expected[1].double(), TOLERANCES["norm", torch.float32])
            step = torch.ones(()) if dtype == torch.int8 else expected[0].float().abs() / 8
            assert ((rows[0].float() - expected[0].float()).abs() <= step.clamp(2**-9)).all()


@pytest.mark.parametrize("candidate", ["reference", "triton"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("width", "groups"), [(96, 1), (2100, 1), (256, 2), (5120, 40)])
def test_silu_and_mul_rounds_its_fp32_result(
    width: int, groups: int, dtype: torch.dtype, candidate: str
) -> None:
    module = implementation(candidate, "activation")
    gate_up = (3 * torch.randn(3, 2 * width)).half()
    floats, rows = poisoned(3, width), poisoned_rows(3, width, groups, dtype)
    module.silu_and_mul(gate_up, floats)
    module.silu_and_mul(gate_up, *rows)
    expected = poisoned_rows(3, width, groups, dtype)
    reference.quantize_rows(floats, *expected)
    assert_same(rows, expected)


@pytest.mark.parametrize("stem", ["quantization", "norm", "activation"])
def test_a_row_depends_on_itself_only(stem: str, rng: np.random.Generator) -> None:
    module = implementation("triton", stem)
    x, weight = torch.randn(9, 2 * 384), torch.randn(2 * 384)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        part = x[rows]
        out, scale = poisoned_rows(len(part), 384 if stem == "activation" else 768, 3, torch.int8)
        if stem == "norm":
            module.add_rms_norm(part, part.clone(), weight, 1e-5, out, scale)
        else:
            call = module.silu_and_mul if stem == "activation" else module.quantize_rows
            call(part, out, scale)
        return out, scale

    whole = run(slice(0, 9))
    for first, last in ((0, 1), (1, 8), (8, 9)):
        part = run(slice(first, last))
        assert_same(part, (whole[0][first:last], whole[1][first:last]))


def test_the_ops_take_rows_of_8_bits() -> None:
    x, weight = torch.randn(4, 96), torch.ones(96)
    rows, expected = poisoned_rows(4, 96, 3, torch.int8), poisoned_rows(4, 96, 3, torch.int8)
    ops.quantize_rows(x, *rows)
    reference.quantize_rows(x, *expected)
    assert_same(rows, expected)
    norm_ops.rms_norm(x, weight, 1e-5, *rows)
    reference_norm.rms_norm(x, weight, 1e-5, *expected)
    assert_same(rows, expected)
    norm_ops.add_rms_norm(x, x.clone(), weight, 1e-5, *rows)
    reference_norm.add_rms_norm(x, x.clone(), weight, 1e-5, *expected)
    assert_same(rows, expected)
    rows, expected = poisoned_rows(4, 48, 1, torch.int8), poisoned_rows(4, 48, 1, torch.int8)
    activation_ops.silu_and_mul(x, *rows)
    reference_activation.silu_and_mul(x, *expected)
    assert_same(rows, expected)


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(4, 96), torch.ones(96)
    rows, scale = poisoned_rows(4, 96, 1, torch.int8)
    with pytest.raises(ValueError, match="out must be int8 or float8_e4m3fn, not torch.float32"):
        ops.quantize_rows(x, torch.empty(4, 96), scale)
    with pytest.raises(ValueError, match=r"\[T, G\] with G a divisor of 96, not \[4, 5\]"):
        ops.quantize_rows(x, rows, torch.empty(4, 5))
    with pytest.raises(ValueError, match=r"scale must have shape \(4, 1\), not \(3, 1\)"):
        ops.quantize_rows(x, rows, scale[:3])
    with pytest.raises(ValueError, match=r"out of torch.int8 needs an out_scale"):
        norm_ops.rms_norm(x, weight, 1e-5, rows)
    with pytest.raises(ValueError, match="with an out_scale must be int8 or float8_e4m3fn"):
        activation_ops.silu_and_mul(x, out_scale=scale)
    with pytest.raises(ValueError, match=r"out_scale is of rows \[T, In\], not of \[2, 2, 96\]"):
        norm_ops.rms_norm(x.view(2, 2, 96), weight, 1e-5, rows.view(2, 2, 96), scale)
    with pytest.raises(ValueError, match="a row of 40000 values does not fit a program"):
        implementation("triton", "quantization").quantize_rows(
            torch.zeros(1, 40000), torch.empty(1, 40000, dtype=torch.int8), torch.empty(1, 1)
        )


def test_triton_refuses_layouts_that_it_would_write_past() -> None:
    x, weight, table = torch.randn(4, 8), torch.ones(8), torch.zeros(9, 8)
    norm, rows = implementation("triton", "norm"), torch.empty(8, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="residual must be contiguous; its strides are"):
        norm.add_rms_norm(x, torch.empty(8, 4).T, weight, 1e-5, x)
    with pytest.raises(ValueError, match="out must have adjacent values in its rows"):
        norm.rms_norm(x, weight, 1e-5, torch.empty(8, 4).T)
    with pytest.raises(ValueError, match="out must have adjacent values in its rows"):
        implementation("triton", "activation").silu_and_mul(torch.randn(4, 16), rows.T)
    with pytest.raises(ValueError, match="out must be contiguous"):
        implementation("triton", "quantization").quantize_rows(x, rows.T, torch.empty(4, 1))
    with pytest.raises(ValueError, match="out must be contiguous"):
        implementation("triton", "embedding").embedding(torch.tensor([1, 2]), table, table[:2, :4])
    qkv, ids, q_out = torch.randn(2, 24), torch.arange(2), torch.empty(2, 1, 8)
    pages = torch.zeros(2, 2, 1, 4, 16, dtype=torch.int8)[..., :12]
    with pytest.raises(ValueError, match="8-bit pages must be contiguous"):
        implementation("triton", "rope").rope_and_write_kv(
            qkv, ids, torch.zeros(2, 2, 4), pages, ids, q_out, None, None, 0.0
        )
