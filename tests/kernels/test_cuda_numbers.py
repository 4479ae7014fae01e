"""The number formats of the CUDA kernels against torch's, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch
from tests.kernels.cuda_host import code_of, library, pointer
from torch import Tensor

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8}
BORDERS = (0.0, -0.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 1.001 * 2**-25, 2.0**-9, 2.0**-10)


def numbers() -> Tensor:
    """Floats of all magnitudes, halfway cases, subnormal numbers and infinities."""
    scale = torch.exp2(torch.randint(-30, 20, (20_000,)))
    coarse = (torch.randn(20_000) * 64).round() / 64 * torch.exp2(torch.randint(-12, 9, (20_000,)))
    special = torch.tensor([*BORDERS, float("inf"), -float("inf")])
    return torch.cat((torch.randn(20_000) * scale, coarse, special))


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_conversions_round_as_torch_does(dtype: torch.dtype) -> None:
    x = numbers()
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)
    bits, back = torch.empty(len(x), dtype=BITS[dtype]), torch.empty(len(x))
    library().convert(
        code_of(dtype), pointer(x), ctypes.c_int64(len(x)), pointer(bits), pointer(back)
    )
    assert torch.equal(bits, x.to(dtype).view(BITS[dtype]))
    assert torch.equal(back, x.to(dtype).float())


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("narrow", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_8_bit_number_is_widened_exactly(wide: torch.dtype, narrow: torch.dtype) -> None:
    """But NaN of e4m3, which a cache does not hold."""
    every = torch.arange(256, dtype=torch.uint8).view(narrow)
    every = every[~every.float().isnan()].view(torch.uint8)
    quads = torch.stack([every.roll(shift) for shift in range(4)], 1).contiguous()
    even, odd = (torch.empty(len(every), 2, dtype=wide) for _ in range(2))
    library().widen(
        code_of(wide),
        code_of(narrow),
        pointer(quads),
        ctypes.c_int64(len(quads)),
        pointer(even),
        pointer(odd),
    )
    expected = quads.view(narrow).float()
    assert torch.equal(even.float(), expected[:, 0::2])
    assert torch.equal(odd.float(), expected[:, 1::2])
