from __future__ import annotations

import pytest
import torch

from headrace_kernels.ops.linear import linear
from headrace_kernels.testing import TOLERANCES, Tolerance, assert_close, poisoned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(8, 576, 96), (16, 1536, 64), (3, 5, 7)])
def test_linear(shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype) -> None:
    rows, inner, outer = shape
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    bias = torch.randn(outer).to(dtype) if with_bias else None
    out = linear(x, weight, bias, poisoned(rows, outer, dtype=dtype))
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    assert_close(out, expected, TOLERANCES["linear", dtype])


@pytest.mark.parametrize("with_bias", [False, True])
def test_fp32_output_of_bf16_inputs_is_not_rounded_to_bf16(with_bias: bool) -> None:
    x, weight = torch.randn(8, 576).bfloat16(), torch.randn(512, 576).bfloat16()
    bias = 100 * torch.randn(512).bfloat16() if with_bias else None
    out = linear(x, weight, bias, poisoned(8, 512))
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    assert_close(out, expected, Tolerance(1e-3, 2**-16, "two products of 8 bits each"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_rows_in_eights_depend_on_themselves_only(
    dtype: torch.dtype, out_dtype: torch.dtype | None, threads: int
) -> None:
    x, weight, bias = torch.randn(264, 192), torch.randn(320, 192), torch.randn(320)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)

    def product(rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, weight, bias, poisoned(len(rows), 320, dtype=out_dtype or dtype))

    whole = product(x)
    for first, last in ((0, 8), (8, 24), (24, 264)):
        assert torch.equal(product(x[first:last]), whole[first:last])


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 4\), not \(3, 5\)"):
        linear(x, torch.randn(3, 5))
    with pytest.raises(ValueError, match="weight must be torch.float32, not torch.bfloat16"):
        linear(x, torch.randn(3, 4).bfloat16())
    with pytest.raises(ValueError, match="out must be torch.float32, not torch.bfloat16"):
        linear(x, torch.randn(3, 4), out=torch.empty(8, 3, dtype=torch.bfloat16))
