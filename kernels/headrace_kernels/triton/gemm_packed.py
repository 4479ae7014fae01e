"""Packed weights (packed_format.py) in Triton: integers as operands, scaled sums, whole weights.

Integers reach the tensor cores exactly, as bf16. Two instructions make two of them from four bytes:
a byte permutation puts a nibble n under the exponent of 128, which gives 128 + n (Kim et al., "Who
Says Elephants Can't Run", arXiv 2211.10017, section 3.3), and a multiply-add takes 128 and the zero
point off. The interpreter, which has no inline assembly and no bf16 arithmetic, converts to fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.packed_format import COLUMNS, GROUP, PackedFormat
from headrace_kernels.triton.builds import Build

DEQUANTIZE_GROUPS = 4
DEQUANTIZE_WARPS = 8

_NIBBLES = """{{
    .reg .b32 nibbles, exponent, one, zero;
    {shift}
    and.b32 nibbles, nibbles, 0x0F0F0F0F;
    mov.b32 exponent, 0x43434343;
    mov.b32 one, 0x3F803F80;
    mov.b32 zero, 0xC308C308;
    prmt.b32 $0, nibbles, exponent, 0x4140;
    prmt.b32 $1, nibbles, exponent, 0x4342;
    fma.rn.bf16x2 $0, $0, one, zero;
    fma.rn.bf16x2 $1, $1, one, zero;
}}"""
LOW_NIBBLES = tl.constexpr(_NIBBLES.format(shift="mov.b32 nibbles, $2;"))
HIGH_NIBBLES = tl.constexpr(_NIBBLES.format(shift="shr.b32 nibbles, $2, 4;"))
"""Four bytes u -> bf16 (u & 15) - 8, or (u >> 4) - 8: 0x4300 | n is 128 + n, 0xC308 is -136."""

BYTES = tl.constexpr("""{
    .reg .b32 low, high, exponent, one, offset;
    and.b32 low, $2, 0x7F7F7F7F;
    not.b32 high, $2;
    and.b32 high, high, 0x80808080;
    mov.b32 one, 0x3F803F80;
    mov.b32 exponent, 0x43434343;
    prmt.b32 $0, low, exponent, 0x4140;
    prmt.b32 $1, low, exponent, 0x4342;
    mov.b32 exponent, 0xC3C3C3C3;
    prmt.b32 offset, high, exponent, 0x4140;
    fma.rn.bf16x2 $0, $0, one, offset;
    prmt.b32 offset, high, exponent, 0x4342;
    fma.rn.bf16x2 $1, $1, one, offset;
}""")
"""Four bytes u -> bf16 u - 128: 128 + (u & 127), less 128 (0xC300), or 256 (0xC380) if u < 128."""


@triton.jit
def integers(u, HIGH: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """uint8 -> u - 2^(BITS - 1) as bf16; of 4 bits the low or the high halves of the bytes."""
    if INTERPRETED:
        if BITS == 4:
            u = (u >> 4) if HIGH else (u & 15)
        return u.to(tl.float32) - (1 << (BITS - 1))
    if BITS == 8:
        return _convert(u, BYTES)
    if HIGH:
        return _convert(u, HIGH_NIBBLES)
    return _convert(u, LOW_NIBBLES)


@triton.jit
def _convert(u, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,r", [u], dtype=tl.bfloat16, is_pure=True, pack=4
    )


@triton.jit
def load_floats(pointers, mask, BITS: tl.constexpr):
    """Scales or minima, of 16 or 32 bits, as fp32. `pointers` count bytes."""
    if BITS == 16:
        return tl.load(pointers.to(tl.pointer_type(tl.float16)), mask, other=0.0).to(tl.float32)
    return tl.load(pointers.to(tl.pointer_type(tl.float32)), mask, other=0.0)


@triton.jit
def load_weights(
    records, column, mask, BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PARTS: tl.constexpr,
    SCALE_BITS: tl.constexpr, INPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """records [..., 1], column [..., 1] -> the weights [..., INPUTS] of an output, in fp32.

    `records` point to the 16 outputs and 32 inputs that hold those of `column`.
    """
    i = tl.arange(0, INPUTS)
    byte = i % 16 if BITS == 4 else i
    u = tl.load(records + byte // 4 * (4 * COLUMNS) + column * 4 + byte % 4, mask, other=0)
    if BITS == 4:
        u = (u >> (i // 16 * 4).to(tl.uint8)) & 15
    integer_bytes: tl.constexpr = COLUMNS * INPUTS * BITS // 8
    size: tl.constexpr = SCALE_BITS // 8
    at = records + integer_bytes + (i // (INPUTS // PARTS) * COLUMNS + column) * size
    zero: tl.constexpr = 0 if HAS_MINIMUM else 1 << (BITS - 1)
    weights = (u.to(tl.float32) - zero) * load_floats(at, mask, SCALE_BITS)
    if HAS_MINIMUM:
        weights += load_floats(at + PARTS * COLUMNS * size, mask, SCALE_BITS)
    return weights


@triton.jit
def scale_and_minimum(
    at, mask, PART: tl.constexpr, PARTS: tl.constexpr, HAS_MINIMUM: tl.constexpr,
    SCALE_BITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one part of each group. The scale stands for a minimum that there is not."""
    SIZE: tl.constexpr = COLUMNS * SCALE_BITS // 8
    scale = load_floats(at + PART * SIZE, mask, SCALE_BITS)
    minimum = scale
    if HAS_MINIMUM:
        minimum = load_floats(at + (PARTS + PART) * SIZE, mask, SCALE_BITS)
    return scale, minimum


@triton.jit
def _add_scaled(
    total, products, x_sums, scale, minimum, HAS_MINIMUM: tl.constexpr, ZERO: tl.constexpr
):
    """total + scale * products + (minimum + ZERO * scale) * x_sums.

    products [groups, outputs, tokens] are those of weights less ZERO. x_sums [groups, 16, tokens]
    are alike in all rows, and spread over those of products without leaving their registers.
    """
    total = tl.fma(products, tl.broadcast_to(scale[:, :, None], products.shape), total)
    if HAS_MINIMUM:
        offset = tl.broadcast_to((minimum + ZERO * scale)[:, :, None], products.shape)
        GROUPS: tl.constexpr = products.shape[0]
        ROWS: tl.constexpr = products.shape[1] // 16
        TOKENS: tl.constexpr = products.shape[2]
        x_sums = tl.broadcast_to(x_sums[:, None, :, :], (GROUPS, ROWS, 16, TOKENS))
        total = tl.fma(tl.reshape(x_sums, products.shape), offset, total)
    return total


@triton.jit
def add_groups(
    total, u_0, u_1, x_0, x_1, ones, scale_0, minimum_0, scale_1, minimum_1,
    BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """total plus the products of inputs 0 to 15 of each group, then of 16 to 31."""
    ZERO: tl.constexpr = 1 << (BITS - 1)
    low, high = integers(u_0, False, BITS, INTERPRETED), integers(u_1, True, BITS, INTERPRETED)
    products = tl.dot(low, x_0, input_precision="ieee")
    x_sums = products
    if HAS_MINIMUM:
        x_sums = tl.dot(ones, x_0, input_precision="ieee")
    if PARTS == 2:
        total = _add_scaled(total, products, x_sums, scale_0, minimum_0, HAS_MINIMUM, ZERO)
        products = tl.dot(high, x_1, input_precision="ieee")
        if HAS_MINIMUM:
            x_sums = tl.dot(ones, x_1, input_precision="ieee")
    else:
        products = tl.dot(high, x_1, products, input_precision="ieee")
        if HAS_MINIMUM:
            x_sums = tl.dot(ones, x_1, x_sums, input_precision="ieee")
    return _add_scaled(total, products, x_sums, scale_1, minimum_1, HAS_MINIMUM, ZERO)


@triton.jit
def sum_of_groups(total):
    """[4, outputs, tokens] -> [outputs, tokens]: (0 + 1) + (2 + 3)."""
    OUTPUTS: tl.constexpr = total.shape[1]
    TOKENS: tl.constexpr = total.shape[2]
    pairs = tl.permute(tl.reshape(total, (2, 2, OUTPUTS, TOKENS)), (0, 2, 3, 1))
    even, odd = tl.split(pairs)
    first, second = tl.split(tl.permute(even + odd, (1, 2, 0)))
    return first + second


@triton.jit(do_not_specialize=["groups"])
def dequantize_kernel(
    weight, out, groups,
    BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PARTS: tl.constexpr, SCALE_BITS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """GROUPS of 32 inputs of the 16 outputs of a block."""
    column = tl.arange(0, COLUMNS)[:, None, None]
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    records = weight + (tl.program_id(0).to(tl.int64) * groups + g) * BLOCK_BYTES
    weights = load_weights(
        records, column, g < groups, BITS, HAS_MINIMUM, PARTS, SCALE_BITS, INPUTS, COLUMNS
    )
    rows = tl.program_id(0).to(tl.int64) * COLUMNS + column
    at = out + (rows * groups + g) * INPUTS + tl.arange(0, INPUTS)[None, None, :]
    tl.store(at, weights.to(out.dtype.element_ty), g < groups)


def dequantize(weight: Tensor, fmt: PackedFormat, out: Tensor) -> None:
    """out = the weights of a packed tensor, rounded. out: [16 * blocks, In], contiguous."""
    blocks, groups, _ = weight.shape
    dequantize_kernel[(blocks, triton.cdiv(groups, DEQUANTIZE_GROUPS))](
        weight,
        out,
        groups,
        **format_constants(fmt),
        GROUPS=DEQUANTIZE_GROUPS,
        num_warps=DEQUANTIZE_WARPS,
    )


def dequantize_build(fmt: PackedFormat) -> Build:
    return Build(
        name="whole weights",
        kernel=dequantize_kernel,
        types={"weight": "*u8", "out": "*bf16", "groups": "i32"},
        constants={**format_constants(fmt), "GROUPS": DEQUANTIZE_GROUPS},
        num_warps=DEQUANTIZE_WARPS,
    )


def format_constants(fmt: PackedFormat) -> dict[str, int | bool]:
    """What a kernel is told of a format."""
    return {
        "BITS": fmt.bits,
        "HAS_MINIMUM": fmt.has_minimum,
        "PARTS": fmt.parts,
        "SCALE_BITS": fmt.scale_bits,
        "BLOCK_BYTES": fmt.block_bytes,
        "COLUMNS": COLUMNS,
        "INPUTS": GROUP,
    }
