"""The CUDA kernel that rounds rows to 8 bits, run on the host, against the reference's bytes."""

from __future__ import annotations

import ctypes

import pytest
import torch
from tests.kernels.cuda_host import SCHEDULES, code_of, library, pointer

from headrace_kernels.reference.quantization import quantize_rows


@pytest.mark.parametrize("out_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "groups", "size"), [(5, 1, 576), (9, 3, 128), (2, 1, 4104)])
def test_bytes_are_those_of_the_reference(
    out_dtype: torch.dtype, dtype: torch.dtype, rows: int, groups: int, size: int
) -> None:
    x = torch.randn(rows, groups * size) * torch.exp2(torch.randint(-9, 9, (rows, 1)))
    x[0] = 0.0
    x[1, 7], x[1, 9] = float("inf"), 3.0
    if rows > 2:
        x[2, 5] = float("nan")
        x[3] = -x[3].abs() * 1e-3
    x = x.to(dtype)
    expected = torch.empty(x.shape, dtype=out_dtype), torch.empty(rows, groups)
    quantize_rows(x, *expected)
    for schedule in SCHEDULES:
        out = torch.full(x.shape, 0x55, dtype=torch.uint8).view(out_dtype)
        scale = torch.full((rows, groups), float("nan"))
        library().quantize(
            code_of(dtype),
            code_of(out_dtype),
            pointer(x),
            pointer(out),
            pointer(scale),
            ctypes.c_int64(rows),
            groups,
            size,
            schedule,
        )
        assert torch.equal(out.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scale.nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
