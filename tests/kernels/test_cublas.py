"""Products that go to torch for many tokens: the choice, on a CPU; cuBLAS itself is not here."""

from __future__ import annotations

import pytest
import torch

from headrace_kernels import dispatch, verified
from headrace_kernels.packed_format import PackedFormat
from headrace_kernels.reference import scaled_linear as reference
from headrace_kernels.reference.quantization import quantize_rows
from headrace_kernels.testing import Tolerance, assert_close, poisoned, random_packed

pytest.importorskip("triton")
from headrace_kernels.cublas import linear, quantized_linear, scaled_linear  # noqa: E402

HALF = Tolerance(1e-3, 2**-9, "rounded to 11 bits")


@pytest.fixture
def triton_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that went to Triton's kernels, which are not run."""
    calls: list[int] = []
    monkeypatch.setattr(linear.few, "linear", lambda x, *rest: calls.append(len(x)))
    monkeypatch.setattr(scaled_linear.few, "scaled_linear", lambda x, *rest: calls.append(len(x)))
    return calls


@pytest.mark.parametrize("with_bias", [False, True])
def test_many_tokens_are_multiplied_by_torch(triton_calls: list[int], with_bias: bool) -> None:
    x, weight = torch.randn(65, 48).half(), torch.randn(40, 48).half()
    bias = torch.randn(40).half() if with_bias else None
    out = poisoned(65, 40, dtype=torch.float16)
    linear.linear(x, weight, bias, out)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    assert_close(out, expected, HALF)
    assert triton_calls == []
    linear.linear(x[:64], weight, bias, out[:64])
    linear.linear(x, weight, bias, poisoned(65, 40))
    assert triton_calls == [64, 65], "few tokens, and results of another type"


def test_many_tokens_multiply_packed_weights_made_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = PackedFormat(4, True)
    packed, dense = random_packed(fmt, 40, 96)
    monkeypatch.setattr(quantized_linear, "FEW_TOKENS", 4)
    monkeypatch.setattr(linear, "FEW_TOKENS", 4)
    monkeypatch.setattr(quantized_linear, "DENSE_BYTES", 2 * 16 * 96 * 2)
    x, bias = torch.randn(5, 96), torch.randn(40).bfloat16()
    out = poisoned(5, 40, dtype=torch.bfloat16)
    quantized_linear.quantized_linear(x, packed, fmt, 16, bias, out)
    expected = x.bfloat16().double() @ dense.T + bias.double()
    # The interpreter cuts the weights to bf16, which errs twice as far as rounding them.
    size = 2**-8 * float(expected.abs().max())
    assert_close(out, expected, Tolerance(size, 2**-7, "weights and results are of 8 bits"))


@pytest.mark.skipif(scaled_linear.refusal("rows", "cpu") is not None, reason="this torch has none")
def test_many_tokens_of_e4m3_are_multiplied_by_torch(triton_calls: list[int]) -> None:
    def draw(rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.empty(rows, 512, dtype=torch.float8_e4m3fn)
        scale = torch.empty(rows, groups)
        quantize_rows(torch.randn(rows, 512), values, scale)
        return values, scale

    (x, x_scale), (weight, weight_scale) = draw(65, 1), draw(32, 1)
    out, expected = (poisoned(65, 32, dtype=torch.bfloat16) for _ in range(2))
    scaled_linear.scaled_linear(x, x_scale, weight, weight_scale, None, out)
    reference.scaled_linear(x, x_scale, weight, weight_scale, None, expected)
    assert_close(out, expected, Tolerance(1e-2, 2**-7, "the output is rounded to 8 bits"))
    assert triton_calls == []
    own = slice(0, 64)
    arguments = (x[own], x_scale[own], weight, weight_scale, None, out[own])
    scaled_linear.scaled_linear(*arguments)
    scaled_linear.scaled_linear(x, x_scale, weight, weight_scale, None, poisoned(65, 32))
    integers = (x.float().to(torch.int8), x_scale, weight.float().to(torch.int8))
    scaled_linear.scaled_linear(*integers, weight_scale, None, out)
    assert triton_calls == [64, 65, 65], "few tokens, fp32 results, int8"


def test_a_mode_that_torch_refuses_goes_to_triton(
    triton_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_linear, "refusal", lambda mode, device: "not on this GPU")
    x = torch.zeros(65, 512, dtype=torch.float8_e4m3fn)
    out, ones = torch.empty(65, 64, dtype=torch.bfloat16), torch.ones(65, 1)
    scaled_linear.scaled_linear(x, ones, x[:64], ones[:64], None, out)
    assert triton_calls == [65]


def test_it_is_no_choice_without_a_gpu_and_never_invariant() -> None:
    facts = dispatch.KernelFacts(
        device="cpu", arch="", dtype=torch.float16, head_dim=64, page_size=64
    )
    for stem in dispatch.CUBLAS_STEMS:
        [candidate] = [c for c in dispatch.CANDIDATES[stem] if c.name == "cublas"]
        assert candidate.invariant_on == ()
        with pytest.raises(dispatch.KernelUnavailableError, match="runs on a GPU only"):
            dispatch.choose(facts, {stem: "cublas"})


def test_it_is_checked_together_with_the_triton_kernels_it_calls() -> None:
    sources = verified._sources(verified.PACKAGE / "cublas" / "quantized_linear.py", set())
    names = {str(path.relative_to(verified.PACKAGE)) for path in sources}
    assert {"cublas/linear.py", "triton/linear.py", "triton/gemm_packed.py"} <= names
    assert "triton/scaled_linear.py" not in names
