from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace_kernels import dispatch, native
from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.ops.linear import linear
from headrace_kernels.testing import TOLERANCES, Tolerance, assert_close, poisoned

DTYPES = (torch.float32, torch.bfloat16)
FP32_OF_BF16 = Tolerance(1e-3, 2**-16, "two products of 8 bits each")
LAST_BIT = Tolerance(2e-4, 2**-7, "one fp32 sum in another order may round to the next bf16")
needs_native = pytest.mark.skipif(
    native.unavailable() is not None, reason=str(native.unavailable())
)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(8, 576, 96), (16, 1536, 64), (3, 5, 7)])
def test_linear(shape: tuple[int, int, int], with_bias: bool, dtype: torch.dtype) -> None:
    rows, inner, outer = shape
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    bias = torch.randn(outer).to(dtype) if with_bias else None
    out = linear(x, weight, bias, poisoned(rows, outer, dtype=dtype))
    assert_close(out, exact(x, weight, bias), TOLERANCES["linear", dtype])


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp32_output_of_bf16_inputs_is_not_rounded_to_bf16(with_bias: bool) -> None:
    x, weight = torch.randn(8, 576).bfloat16(), torch.randn(512, 576).bfloat16()
    bias = 100 * torch.randn(512).bfloat16() if with_bias else None
    out = linear(x, weight, bias, poisoned(8, 512))
    assert_close(out, exact(x, weight, bias), FP32_OF_BF16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_shapes(isa: str, dtype: torch.dtype, threads: int) -> None:
    """Tiles, vectors, chunks and blocks of K that are full and not; rows that lie apart."""
    generator = torch.Generator().manual_seed(0)

    def draw(*candidates: int) -> int:
        return candidates[int(torch.randint(len(candidates), (), generator=generator))]

    for _ in range(60):
        rows = draw(0, 1, 2, 5, 6, 7, 12, 13, 23, 24, 25, 31, 50)
        outer = draw(1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 130, 257)
        inner = draw(0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 576, 2047, 2048, 2049, 4100)
        x = torch.randn(rows, inner + 3).to(dtype)[:, :inner]
        weight = torch.randn(outer, inner + 5).to(dtype)[:, :inner]
        bias = torch.randn(outer).to(dtype) if draw(0, 1) else None
        for out_dtype in DTYPES:
            memory = poisoned(rows, outer + 2, dtype=out_dtype)
            torch.ops.headrace.linear(x, weight, bias, memory[:, :outer])
            assert memory[:, outer:].isnan().all(), "nothing behind a row is written"
            tolerance = TOLERANCES["linear", out_dtype]
            assert_close(memory[:, :outer], exact(x, weight, bias), tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_rows_in_eights_depend_on_themselves_only(
    implementation: str, dtype: torch.dtype, out_dtype: torch.dtype | None, threads: int
) -> None:
    x, weight, bias = torch.randn(264, 192), torch.randn(320, 192), torch.randn(320)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)

    def product(rows: Tensor) -> Tensor:
        return linear(rows, weight, bias, poisoned(len(rows), 320, dtype=out_dtype or dtype))

    whole = product(x)
    for first, last in ((0, 8), (8, 24), (24, 264)):
        assert torch.equal(product(x[first:last]), whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [192, 300, 2600])
def test_any_row_depends_on_itself_only(isa: str, dtype: torch.dtype, inner: int) -> None:
    """Wherever it is in whatever batch, and whatever the number of threads and of outputs."""
    x, weight = torch.randn(61, inner).to(dtype), torch.randn(150, inner).to(dtype)
    whole = poisoned(61, 150)
    torch.ops.headrace.linear(x, weight, None, whole)
    before = native.num_threads()
    for threads in (1, 3):
        native.set_num_threads(threads)
        for first, count in ((0, 1), (60, 1), (1, 2), (3, 3), (5, 7), (2, 24), (1, 59), (11, 50)):
            out = poisoned(count, 150)
            torch.ops.headrace.linear(x[first : first + count], weight, None, out)
            assert torch.equal(out, whole[first : first + count])
        part = poisoned(61, 31)
        torch.ops.headrace.linear(x, weight[3:34], None, part)
        assert torch.equal(part, whole[:, 3:34])
    native.set_num_threads(before)


@needs_native
@pytest.mark.skipif(native.cpu_isa() != "avx512", reason="this CPU has no avx512")
def test_avx2_and_avx512_agree_to_the_bit_in_fp32() -> None:
    x, weight, results = torch.randn(9, 2100), torch.randn(70, 2100), []
    for level in ("avx2", "avx512"):
        native.set_cpu_isa(level)
        results.append(poisoned(9, 70))
        torch.ops.headrace.linear(x, weight, None, results[-1])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_and_reference_agree(isa: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(16, 576).to(dtype), torch.randn(96, 576).to(dtype)
    facts = dispatch.KernelFacts(device="cpu", arch="", dtype=dtype, head_dim=64, page_size=16)
    outs = []
    for name in ("reference", "cpu"):
        outs.append(poisoned(16, 96, dtype=dtype))
        dispatch.choose(facts, {"linear": name}).linear(x, weight, None, outs[-1])
    assert_close(outs[1], outs[0], LAST_BIT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(isa: str, dtype: torch.dtype) -> None:
    x, weight = torch.ones(8, 64).to(dtype), torch.ones(20, 64).to(dtype)
    x[2, 3], x[5, 63] = float("nan"), float("inf")
    out = poisoned(8, 20)
    torch.ops.headrace.linear(x, weight, None, out)
    assert out[2].isnan().all() and torch.equal(out[5], torch.full((20,), float("inf")))
    assert torch.equal(out[[0, 1, 3, 4, 6, 7]], torch.full((6, 20), 64.0))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 40), torch.randn(5, 40), torch.randn(5)
    arguments = (x.to(dtype), weight.to(dtype), bias.to(dtype), torch.empty(3, 5))
    torch.library.opcheck(torch.ops.headrace.linear.default, arguments)


@needs_native
def test_what_the_native_kernel_refuses_goes_to_the_reference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    half = dispatch.KernelFacts(
        device="cpu", arch="", dtype=torch.float16, head_dim=64, page_size=16
    )
    [reason] = [
        decision.reason
        for decision in dispatch.explain(half)
        if (decision.stem, decision.candidate) == ("linear", "cpu")
    ]
    assert reason == "takes float32 and bfloat16, not torch.float16"
    log_once.cache_clear()
    x, weight = torch.randn(8, 16).half(), torch.randn(4, 16).half()
    kernels = dispatch.choose(
        dispatch.KernelFacts(device="cpu", arch="", dtype=torch.float32, head_dim=64, page_size=16),
        {"linear": "cpu"},
    )
    out = poisoned(8, 4, dtype=torch.float16)
    with caplog.at_level("INFO"):
        kernels.linear(x, weight, None, out)
    assert_close(out, exact(x, weight), Tolerance(1e-3, 2**-10, "rounded to 11 bits"))
    [record] = caplog.records
    assert "linear goes to the reference: " in record.getMessage()


@needs_native
def test_wrong_tensors_are_refused() -> None:
    x, weight, out = torch.randn(4, 8), torch.randn(3, 8), torch.empty(4, 3)
    op = torch.ops.headrace.linear
    for arguments, message in (
        ((x, weight[:, :7], None, out), r"weight must be a CPU tensor \[3, 8\]"),
        ((x, weight.bfloat16(), None, out), "weight has the wrong type"),
        ((x, weight.T.contiguous().T, None, out), r"weight must be a CPU tensor \[3, 8\]"),
        ((x, weight, torch.ones(4), out), r"bias must be a contiguous CPU tensor \[3\]"),
        ((x, weight, None, out[:2]), r"out must be a CPU tensor \[4, 3\]"),
        ((x, weight, None, out.half()), "out must be float32 or bfloat16"),
        ((x[0], weight, None, out), "x and weight must have 2 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"weight must have shape \(3, 4\), not \(3, 5\)"):
        linear(x, torch.randn(3, 5))
    with pytest.raises(ValueError, match="weight must be torch.float32, not torch.bfloat16"):
        linear(x, torch.randn(3, 4).bfloat16())
    with pytest.raises(ValueError, match="out must be torch.float32, not torch.bfloat16"):
        linear(x, torch.randn(3, 4), out=torch.empty(8, 3, dtype=torch.bfloat16))
