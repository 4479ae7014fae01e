"""Triton's matrix products, in its interpreter: fp16 and fp32, since it computes bf16 wrongly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts, KernelUnavailableError, choose
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.testing import TOLERANCES, Tolerance, assert_close, poisoned

pytest.importorskip("triton")
from headrace_kernels.triton import gemm_tiles  # noqa: E402
from headrace_kernels.triton import linear as linear_module  # noqa: E402

HALF = Tolerance(2e-4, 2**-10, "the output is rounded to 11 bits")
FP32_OF_HALF = Tolerance(1e-4, 1e-5, "exact products, summed in fp32")


def kernels(stem: str, dtype: torch.dtype = torch.float32) -> KernelSet:
    facts = KernelFacts(device="cpu", arch="", dtype=dtype, head_dim=64, page_size=64)
    return choose(facts, {stem: "triton"})


@pytest.fixture(params=["descriptors", "pointers"])
def fetch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How tiles are fetched where rows are aligned: as on sm_90, and as on sm_80."""
    if request.param == "pointers":
        older = gemm_tiles.hardware_of("sm_80")
        monkeypatch.setattr(gemm_tiles, "hardware", lambda device: older)
    return str(request.param)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a few tiles have several parts, as those of a model have."""
    monkeypatch.setattr(gemm_tiles, "SPLIT_PROGRAMS", 12)
    monkeypatch.setattr(gemm_tiles, "MIN_PART_INPUTS", 64)
    monkeypatch.setattr(gemm_tiles, "PART_MULTIPLE", 128)


@pytest.fixture
def ascending_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """tl.dot adds products in ascending order, as a tensor core does; BLAS goes by the size."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        total, a_data, b_data = (
            d.data,
            *(_values(operand).astype(d.data.dtype) for operand in (a, b)),
        )
        for k in range(a_data.shape[1]):
            total = total + a_data[:, k : k + 1] * b_data[k]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def _values(operand: Any) -> npt.NDArray[Any]:
    """The numbers of an operand of tl.dot: its bits, if they are e4m3."""
    if operand.data.dtype == np.uint8:
        return torch.from_numpy(operand.data).view(torch.float8_e4m3fn).float().numpy()
    return operand.data


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (1, 64, 16), (17, 100, 70), (40, 576, 96), (65, 136, 130)]
)
def test_linear(
    shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype, fetch: str
) -> None:
    tokens, inputs, outputs = shape
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    for out_dtype in (dtype, torch.float32):
        memory = poisoned(tokens, outputs + 3, dtype=out_dtype)
        kernels("linear", dtype).linear(x, weight, bias, memory[:, :outputs])
        assert memory[:, outputs:].isnan().all(), "nothing behind a row is written"
        tolerance = TOLERANCES["linear", torch.float32] if dtype == torch.float32 else FP32_OF_HALF
        tolerance = HALF if out_dtype == torch.float16 else tolerance
        assert_close(memory[:, :outputs], exact(x, weight, bias), tolerance)


@pytest.mark.usefixtures("small_parts", "ascending_dots")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_of_linear_has_the_same_bits_for_every_t(
    dtype: torch.dtype, fetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(130, 320).to(dtype), torch.randn(96, 320).to(dtype)
    linear = kernels("linear", dtype).linear
    assert gemm_tiles.parts_of(96, 320) == (3, 128)
    whole = poisoned(130, 96)
    with monkeypatch.context() as one_program_a_tile:
        one_program_a_tile.setattr(linear_module, "splits", lambda *sizes: False)
        linear(x, weight, None, whole)
    assert_close(whole, exact(x, weight), TOLERANCES["linear", torch.float32])
    for first, tokens in ((0, 1), (129, 1), (3, 2), (0, 16), (1, 17), (7, 33), (60, 70), (1, 129)):
        out = poisoned(tokens, 96)
        linear(x[first : first + tokens], weight, None, out)
        assert torch.equal(out, whole[first : first + tokens])


def test_parts_fill_the_multiprocessors_and_depend_on_the_matrix_only() -> None:
    for outputs, inputs in ((4096, 4096), (6144, 4096), (28672, 4096), (1024, 3072), (576, 576)):
        parts, part_inputs = gemm_tiles.parts_of(outputs, inputs)
        assert (parts - 1) * part_inputs < inputs <= parts * part_inputs
        assert part_inputs % 256 == 0
        assert parts * -(-outputs // 64) <= gemm_tiles.SPLIT_PROGRAMS or parts == 1
    assert gemm_tiles.parts_of(4096, 4096) == (4, 1024)
    assert gemm_tiles.parts_of(4096, 14336)[0] == 4


def test_a_launch_leaves_no_arrivals_behind() -> None:
    x, weight, out = torch.randn(2, 512), torch.randn(64, 512), poisoned(2, 64)
    for _ in range(2):
        kernels("linear").linear(x, weight, None, out)
        assert_close(out, exact(x, weight), TOLERANCES["linear", torch.float32])
    assert not gemm_tiles.scratch(x.device)[1].any()


def test_what_triton_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(KernelUnavailableError, match="interpreter multiplies bfloat16 wrongly"):
        kernels("linear", torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match="not torch.float64"):
        kernels("linear", torch.float64)
