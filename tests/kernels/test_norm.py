from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace_kernels.ops.norm import add_rms_norm, rms_norm
from headrace_kernels.testing import TOLERANCES, assert_close, poisoned

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = (torch.float32, torch.bfloat16)


def naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 576), (3, 100), (0, 64)])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[1])
    out = rms_norm(x, weight, 1e-5, poisoned(*shape, dtype=dtype))
    assert out.dtype == dtype
    assert_close(out, naive(x, weight, 1e-5), TOLERANCES["norm", dtype])


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_size(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """Vectors that are full and not, in groups that are full and not; rows that lie apart."""
    for size in (*range(1, 20), *range(31, 34), *range(47, 50), *range(63, 66), 79, 81, 127, 129):
        wide, residual, weight = torch.randn(3, size + 5), torch.randn(3, size), torch.randn(size)
        x, total = wide.to(dtype)[:, :size], residual.double()
        out = rms_norm(x, weight, 1e-5, poisoned(3, size, dtype=out_dtype))
        assert_close(out, naive(x, weight, 1e-5), TOLERANCES["norm", out_dtype])
        total = total + x.double()
        out = add_rms_norm(x, residual, weight, 1e-5, poisoned(3, size, dtype=out_dtype))
        assert_close(residual, total, TOLERANCES["norm", torch.float32])
        assert_close(out, naive(total, weight, 1e-5), TOLERANCES["norm", out_dtype])


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 3, 80, 100, 576, 1025])
def test_triton(size: int, dtype: torch.dtype) -> None:
    wide, residual, weight = torch.randn(3, size + 5), torch.randn(3, size), torch.randn(size)
    x, total = wide.to(dtype)[:, :size], residual.double()
    tolerance = TOLERANCES["norm", torch.float32 if dtype == torch.float32 else torch.bfloat16]
    wide_out = poisoned(3, size + 7, dtype=dtype)
    out = rms_norm(x, weight, 1e-5, wide_out[:, :size])
    assert_close(out, naive(x, weight, 1e-5), tolerance)
    assert wide_out[:, size:].isnan().all()
    total = total + x.double()
    out = add_rms_norm(x, residual, weight.half(), 1e-5, poisoned(3, size, dtype=dtype))
    assert_close(residual, total, TOLERANCES["norm", torch.float32])
    assert_close(out, naive(total, weight.half(), 1e-5), tolerance)
    x = torch.randn(2, 2, size)
    assert_close(
        rms_norm(x, weight, 1e-5), naive(x, weight, 1e-5), TOLERANCES["norm", torch.float32]
    )
    assert rms_norm(x[:0, 0], weight, 1e-5).shape == (0, size)


def test_rms_norm_of_zeros_and_of_large_values() -> None:
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e18)))
    out = rms_norm(x, torch.ones(64), 1e-5)
    assert torch.equal(out[0], torch.zeros(64))
    assert_close(out[1], torch.ones(64), TOLERANCES["norm", torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(8, 48).to(dtype), torch.randn(8, 48), torch.randn(48)
    total = residual.double() + x.double()
    out = add_rms_norm(x, residual, weight, 1e-5, poisoned(8, 48, dtype=dtype))
    assert_close(residual, total, TOLERANCES["norm", torch.float32])
    assert_close(out, naive(total, weight, 1e-5), TOLERANCES["norm", dtype])


def test_a_row_depends_on_itself_only(threads: int) -> None:
    x, weight = torch.randn(520, 577), torch.randn(577)
    whole = rms_norm(x, weight, 1e-5)
    for first, last in ((0, 8), (8, 24), (24, 520)):
        assert torch.equal(rms_norm(x[first:last], weight, 1e-5), whole[first:last])


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), not \(4,\)"):
        rms_norm(x, torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="residual must be torch.float32, not torch.bfloat16"):
        add_rms_norm(x, x.bfloat16(), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="weight must be of a float dtype"):
        rms_norm(x, torch.ones(8, dtype=torch.int32), 1e-5)
