"""Triton's matrix products, in its interpreter: fp16 and fp32, since it computes bf16 wrongly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts, KernelUnavailableError, choose
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.packed_format import FORMATS, PackedFormat
from headrace_kernels.packed_weight import unpack_rows
from headrace_kernels.reference.quantization import quantize_rows
from headrace_kernels.testing import (
    TOLERANCES,
    Tolerance,
    assert_close,
    poisoned,
    random_packed,
)

pytest.importorskip("triton")
from headrace_kernels.triton import gemm_packed, gemm_tiles  # noqa: E402
from headrace_kernels.triton import linear as linear_module  # noqa: E402
from headrace_kernels.triton import quantized_linear as quantized_linear_module  # noqa: E402
from headrace_kernels.triton import scaled_linear as scaled_linear_module  # noqa: E402

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


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [((3, 5, 7), True), ((1, 64, 16), False), ((17, 100, 70), True), ((40, 320, 96), False)]
    + [((65, 136, 130), True)],
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
def test_a_row_of_linear_has_the_same_bits_for_every_t(
    fetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float16
    x, weight = torch.randn(70, 320).to(dtype), torch.randn(96, 320).to(dtype)
    linear = kernels("linear", dtype).linear
    assert gemm_tiles.parts_of(96, 320) == (3, 128)
    whole = poisoned(70, 96)
    with monkeypatch.context() as one_program_a_tile:
        one_program_a_tile.setattr(linear_module, "splits", lambda *sizes: False)
        linear(x, weight, None, whole)
    assert_close(whole, exact(x, weight), TOLERANCES["linear", torch.float32])
    for first, tokens in ((0, 1), (69, 1), (0, 16), (1, 17), (7, 33), (5, 65)):
        out = poisoned(tokens, 96)
        linear(x[first : first + tokens], weight, None, out)
        assert torch.equal(out, whole[first : first + tokens])


def eight_bit(
    rows: int, inputs: int, dtype: torch.dtype, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows of 8 bits with `groups` scales, and the same in float64."""
    values, scale = torch.empty(rows, inputs, dtype=dtype), torch.empty(rows, groups)
    quantize_rows(torch.randn(rows, inputs), values, scale)
    dense = values.double().view(rows, groups, -1) * scale.double().unsqueeze(-1)
    return values, scale, dense.flatten(1)


def block_scaled(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    values, _, _ = eight_bit(outputs, inputs, dtype, 1)
    scale = torch.rand(-(-outputs // 128), inputs // 128) / 100
    wide = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values, scale, values.double() * wide[:outputs, :inputs]


EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((3, 40, 7), False), ((70, 176, 70), False), ((3, 128, 40), True), ((20, 384, 200), True)],
)
def test_scaled_linear(
    shape: tuple[int, int, int], blocks: bool, dtype: torch.dtype, fetch: str
) -> None:
    tokens, inputs, outputs = shape
    x, x_scale, rows = eight_bit(tokens, inputs, dtype, inputs // 128 if blocks else 1)
    if blocks:
        weight, weight_scale, dense = block_scaled(outputs, inputs, dtype)
    else:
        weight, weight_scale, dense = eight_bit(outputs, inputs, dtype, 1)
    bias = torch.randn(outputs).half()
    for own_bias, out_dtype in ((None, torch.float32), (bias, torch.float16)):
        memory = poisoned(tokens, outputs + 3, dtype=out_dtype)
        out = memory[:, :outputs]
        kernels("scaled_linear").scaled_linear(x, x_scale, weight, weight_scale, own_bias, out)
        assert memory[:, outputs:].isnan().all(), "nothing behind a row is written"
        tolerance = HALF if out_dtype == torch.float16 else FP32_OF_HALF
        assert_close(out, exact(rows, dense, own_bias), tolerance)


@pytest.mark.usefixtures("small_parts", "ascending_dots")
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_a_row_of_scaled_linear_has_the_same_bits_for_every_t(
    dtype: torch.dtype, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, x_scale, rows = eight_bit(70, 256, dtype, 2 if blocks else 1)
    weight, weight_scale, dense = (
        block_scaled(70, 256, dtype) if blocks else eight_bit(70, 256, dtype, 1)
    )
    multiply = kernels("scaled_linear").scaled_linear
    assert gemm_tiles.parts_of(70, 256)[0] == 2
    whole = poisoned(70, 70)
    with monkeypatch.context() as one_program_a_tile:
        one_program_a_tile.setattr(scaled_linear_module, "splits", lambda *sizes: False)
        multiply(x, x_scale, weight, weight_scale, None, whole)
    assert_close(whole, exact(rows, dense), FP32_OF_HALF)
    for first, tokens in ((0, 1), (69, 1), (1, 17), (30, 40), (1, 69)):
        out, own = poisoned(tokens, 70), slice(first, first + tokens)
        multiply(x[own], x_scale[own], weight, weight_scale, None, out)
        assert torch.equal(out, whole[own])


def large_channel(tokens: int, inputs: int) -> Tensor:
    x = torch.randn(tokens, inputs) + torch.randn(tokens, 1)
    x[:, 5] *= 50
    return x


def relative_to_largest(expected: Tensor) -> Tolerance:
    own = TOLERANCES["quantized_linear", torch.float32]
    size = max(1.0, float(expected.abs().max()))
    return Tolerance(own.absolute * size, own.relative, own.reason)


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [(fmt, (18, 288, 50)) for fmt in FORMATS]
    + [(PackedFormat(4, True), shape) for shape in ((3, 64, 20), (70, 128, 16))],
    ids=str,
)
def test_quantized_linear(fmt: PackedFormat, shape: tuple[int, int, int]) -> None:
    tokens, inputs, outputs = shape
    x, (packed, dense) = large_channel(tokens, inputs), random_packed(fmt, outputs, inputs)
    bias = torch.randn(outputs)
    expected = exact(x.bfloat16(), dense, bias)
    memory = poisoned(tokens, outputs + 3)
    multiply = kernels("quantized_linear").quantized_linear
    multiply(x, packed, fmt, 16, bias, memory[:, :outputs])
    assert memory[:, outputs:].isnan().all(), "nothing behind a row is written"
    assert_close(memory[:, :outputs], expected, relative_to_largest(expected))


@pytest.mark.usefixtures("small_parts", "ascending_dots")
@pytest.mark.parametrize("fmt", [PackedFormat(4, True), PackedFormat(8, False, 16)], ids=str)
def test_a_row_of_quantized_linear_has_the_same_bits_for_every_t(
    fmt: PackedFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, (packed, dense) = large_channel(40, 320), random_packed(fmt, 34, 320)
    multiply = kernels("quantized_linear").quantized_linear
    assert gemm_tiles.parts_of(34, 320)[0] == 3
    whole = poisoned(40, 34)
    with monkeypatch.context() as one_program_a_tile:
        one_program_a_tile.setattr(quantized_linear_module, "splits", lambda *sizes: False)
        multiply(x, packed, fmt, 16, None, whole)
    expected = exact(x.bfloat16(), dense)
    assert_close(whole, expected, relative_to_largest(expected))
    for first, tokens in ((0, 1), (39, 1), (1, 17), (1, 39)):
        out = poisoned(tokens, 34)
        multiply(x[first : first + tokens], packed, fmt, 16, None, out)
        assert torch.equal(out, whole[first : first + tokens])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_quantized_linear_spoils_only_rows_that_are_not_finite() -> None:
    fmt = PackedFormat(4, True)
    x, (packed, _) = torch.randn(4, 96), random_packed(fmt, 20, 96)
    dirty = x.clone()
    dirty[1, 40], dirty[3, 90] = float("nan"), float("inf")
    clean, out = poisoned(4, 20), poisoned(4, 20)
    for rows, result in ((x, clean), (dirty, out)):
        kernels("quantized_linear").quantized_linear(rows, packed, fmt, 16, None, result)
    assert not out[[1, 3]].isfinite().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def run_ptx(assembly: str, word: int) -> list[float]:
    """The four bf16 that a program of gemm_packed makes of a word (PTX ISA, section 9.7)."""

    def bf16(bits: int) -> float:
        return float(np.array([bits << 16], np.uint32).view(np.float32)[0])

    def permute(low: int, high: int, selector: int) -> int:
        data = low.to_bytes(4, "little") + high.to_bytes(4, "little")
        return int.from_bytes([data[selector >> 4 * i & 15] for i in range(4)], "little")

    def multiply_add(x: int, y: int, z: int) -> int:
        halves = [(v & 0xFFFF, v >> 16) for v in (x, y, z)]
        sums = [np.float32(bf16(a) * bf16(b) + bf16(c)) for a, b, c in zip(*halves, strict=True)]
        bits = [int(value.view(np.uint32)) for value in sums]
        assert not any(pattern & 0xFFFF for pattern in bits), "exact in bf16"
        return bits[0] >> 16 | bits[1] & 0xFFFF0000

    run = {
        "mov.b32": lambda a: a,
        "not.b32": lambda a: ~a & 0xFFFFFFFF,
        "and.b32": lambda a, b: a & b,
        "shr.b32": lambda a, b: a >> b,
        "prmt.b32": permute,
        "fma.rn.bf16x2": multiply_add,
    }
    registers = {"$2": word}
    for line in assembly.strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name in run:
            target, *sources = operands.split(", ")
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = run[name](*values)
        else:
            assert name in (".reg", ""), line
    pairs = registers["$0"], registers["$1"]
    return [bf16(half) for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]


def test_bytes_become_bf16() -> None:
    for first in range(256):
        values = [first, 255 - first, first ^ 0x5A, first * 7 % 256]
        word = int.from_bytes(values, "little")
        assert run_ptx(gemm_packed.BYTES.value, word) == [v - 128 for v in values]
        assert run_ptx(gemm_packed.LOW_NIBBLES.value, word) == [(v & 15) - 8 for v in values]
        assert run_ptx(gemm_packed.HIGH_NIBBLES.value, word) == [(v >> 4) - 8 for v in values]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantized_embedding(fmt: PackedFormat) -> None:
    packed, _ = random_packed(fmt, 100, 96)
    ids, out = torch.tensor([0, 99, 15, 16, 15, -1, 112]), poisoned(7, 96)
    out.zero_()
    kernels("quantized_linear").quantized_embedding(ids, packed, fmt, out)
    rounding = Tolerance(1e-6, 2**-22, "a product and a sum")
    assert_close(out[:5], unpack_rows(packed, fmt, ids[:5]), rounding)
    assert out[5:].isnan().all(), "there are no such rows"


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
