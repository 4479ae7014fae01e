from __future__ import annotations

import pytest
import torch

from headrace_kernels.ops.activation import silu_and_mul
from headrace_kernels.testing import TOLERANCES, Tolerance, assert_close, poisoned

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (8, 1536), (5, 33), (0, 16)])
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(shape[0], 2 * shape[1])).to(dtype)
    out = silu_and_mul(gate_up, poisoned(*shape, dtype=dtype))
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(out, gate * torch.sigmoid(gate) * up, TOLERANCES["activation", dtype])


EVERYWHERE = pytest.mark.parametrize(
    "implementation", ["reference", "triton", "scalar", "avx2", "avx512"], indirect=True
)
# The interpreter computes with numpy, which warns where a GPU does not.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("implementation", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1536), (3, 33), (2, 2100), (0, 16)])
def test_triton(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tokens, width = shape
    gate_up = (3 * torch.randn(tokens, 2 * width + 3)).to(dtype)[:, : 2 * width]
    wide_out = poisoned(tokens, width + 5, dtype=dtype)
    out = silu_and_mul(gate_up, wide_out[:, :width])
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    tolerance = torch.float32 if dtype == torch.float32 else torch.bfloat16
    assert_close(out, expected, TOLERANCES["activation", tolerance])
    assert wide_out[:, width:].isnan().all()


@QUIET
@EVERYWHERE
def test_gates_far_from_zero_do_not_overflow() -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    assert silu_and_mul(gate_up).tolist() == [[0.0, pytest.approx(0.0), 100.0, 1e4]]


@QUIET
@EVERYWHERE
def test_gates_of_every_size() -> None:
    """Relative to the result: also where it is small, until exp overflows."""
    gate = torch.cat((torch.linspace(-87, 87, 4001), torch.tensor([1e-30, -1e-30, 1e-42])))
    out = silu_and_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    expected = gate.double() * torch.sigmoid(gate.double())
    assert_close(out, expected, Tolerance(1e-44, 1e-6, "exp, and four roundings in fp32"))


def test_gates_that_are_no_numbers() -> None:
    inf, nan = float("inf"), float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = torch.tensor([[inf, nan, 1.0, 2.0, 1.0, nan]], dtype=dtype)
        out = silu_and_mul(gate_up)
        assert out[0, 0] == inf
        assert out[0, 1:].isnan().all()


def test_a_row_depends_on_itself_only(threads: int) -> None:
    gate_up = torch.randn(520, 2 * 333)
    whole = silu_and_mul(gate_up)
    for first, last in ((0, 8), (8, 24), (24, 520)):
        assert torch.equal(silu_and_mul(gate_up[first:last]), whole[first:last])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="even width, not 3"):
        silu_and_mul(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"out must have shape \(2, 2\)"):
        silu_and_mul(torch.randn(2, 4), torch.empty(2, 4))
