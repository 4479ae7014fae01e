from __future__ import annotations

import pytest
import torch

from headrace_kernels.kv_format import (
    from_pages,
    head_dim_of,
    quantize,
    row_size,
    to_pages,
    values_and_scales,
    write_tokens,
)
from headrace_kernels.reference.quantization import quantize_rows

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_page_is_its_values_and_then_its_scales(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 2, 2, 5, 12)
    whole = to_pages(x, dtype)
    layer = whole[:, 1]
    values, scales = values_and_scales(layer)
    assert layer.shape == (2, 2, 2, 5, row_size(12, dtype))
    assert head_dim_of(layer) == 12
    assert scales is not None
    assert values.shape == (2, 2, 2, 5, 12)
    assert scales.shape == (2, 2, 2, 5)
    page = layer[1, 1, 0].contiguous().view(torch.int8).flatten()
    assert torch.equal(page[:60].view(5, 12), values[1, 1, 0].view(torch.int8))
    assert torch.equal(page[60:].view(torch.float32), scales[1, 1, 0])

    expected, expected_scales = torch.empty(5, 12, dtype=dtype), torch.empty(5, 1)
    quantize_rows(x[1, 1, 1, 0], expected, expected_scales)
    assert torch.equal(values[1, 1, 0].float(), expected.float())
    assert torch.equal(scales[1, 1, 0, :, None], expected_scales)
    assert torch.equal(from_pages(layer)[1, 1, 0], expected.float() * expected_scales)

    values.fill_(0)
    scales.fill_(0)
    assert not layer.view(torch.int8).any()
    assert whole[:, 0].view(torch.int8).any()


@pytest.mark.parametrize("dtype", [*EIGHT_BITS, torch.float16])
def test_tokens_are_written_one_by_one(dtype: torch.dtype) -> None:
    x = torch.randn(4, 2, 3, 8, 16)
    cache = torch.zeros(4, 2, 3, 8, row_size(16, dtype), dtype=dtype)
    slots = torch.randperm(32)
    write_tokens(cache, slots, x.permute(0, 3, 1, 2, 4).flatten(0, 1)[slots])
    write_tokens(cache, slots[:0], torch.empty(0, 2, 3, 16))
    assert torch.equal(from_pages(cache), from_pages(to_pages(x, dtype)))


def test_floats_have_no_scales() -> None:
    cache = torch.randn(2, 2, 1, 4, 6).half()
    values, scales = values_and_scales(cache)
    assert values is cache
    assert scales is None
    assert row_size(6, torch.float16) == 6


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="heads of multiples of 4, not 6"):
        row_size(6, torch.int8)
    pages = torch.zeros(2, 8, 12, dtype=torch.int8)[:, :, :8]
    with pytest.raises(ValueError, match="8-bit pages must be contiguous"):
        values_and_scales(pages)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_scale_is_a_number_only_of_numbers(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [3e38, -1.0]])
    values, scales = quantize(x, dtype)
    assert scales[0] == 0
    assert scales[1:3].isnan().all()
    assert scales[3].isfinite()
    assert values.float().isfinite().all()
