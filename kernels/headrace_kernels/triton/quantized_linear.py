"""Products of packed 4- and 8-bit weights with bf16 activations, and rows of such weights.

4096 x 4096 weights of 4.5 bits take an H200 2.2 us to read: 34 weights a clock on each
multiprocessor, under four instructions a weight for each of its 128 lanes. So records go from
memory to shared memory as they are, and from there into the registers of the tensor cores'
operand, where under one and a half instructions make a weight bf16. Weights stay integers and sums
of their products are scaled in fp32: exact, as the op says, and cheaper than scaling weights as
long as tokens are few. For many tokens, where arithmetic counts, this is slower than a dense
product: cublas/quantized_linear.py has one.

A program has GROUPS of 32 inputs at once, each a product of its own (a batch of the tensor core's
instruction) with its own fp32 sums; those are added at the end of a part of K, pairwise. That and
gemm_tiles.py make a row's bits depend on that row only.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.packed_format import COLUMNS, GROUP, PackedFormat
from headrace_kernels.triton.builds import Build
from headrace_kernels.triton.gemm_packed import (
    add_groups,
    dequantize_build,
    format_constants,
    load_weights,
    scale_and_minimum,
    sum_of_groups,
)
from headrace_kernels.triton.gemm_tiles import (
    GROUP_TILES,
    Hardware,
    Tiling,
    alignment,
    hardware,
    hardware_of,
    lacks_tensor_cores,
    parts_of,
    scratch,
    splits,
    store_tile,
    sum_of_parts,
    tile_of,
    tiles_of,
)

GROUPS = 4
"""Of 32 inputs, that a program has at once: one for each of its warps."""
STAGE_MEMORY = 64 * 1024
EMBEDDING_GROUPS = 32
MINIMUM = PackedFormat(4, True)
SIZES = ["T", "o_units", "groups", "x_units", "out_units", "parts", "part_inputs"]


SPLIT_PROGRAMS = 1056
"""Eight on each of 132 multiprocessors: these programs have less on their way than dense ones."""


@triton.jit
def _operand(at, mask, INTERPRETED: tl.constexpr):
    """Activations [groups, tokens, 16] -> [groups, 16, tokens], rounded to bf16 unless they are."""
    x = tl.permute(tl.load(at, mask, other=0.0), (0, 2, 1))
    return x if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def _product(
    x_rows, records, column, begin, end, groups,
    BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PARTS: tl.constexpr, SCALE_BITS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    INTERPRETED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """weight[outputs, groups begin to end] @ x[tokens, these groups].T

    WHOLE: GROUPS divides the groups of a row.
    """
    g, j = tl.arange(0, GROUPS), tl.arange(0, 16)
    in_row = (begin + g) * BLOCK_BYTES
    u_at = (records + column * 4)[None, :, None] + in_row[:, None, None]
    u_at += (j // 4 * (4 * COLUMNS) + j % 4)[None, None, :]
    floats = COLUMNS * INPUTS * BITS // 8 + column * (SCALE_BITS // 8)
    scales_at = (records + floats)[None, :] + in_row[:, None]
    x_at = x_rows[None, :, None] + ((begin + g) * INPUTS)[:, None, None] + j[None, None, :]
    total = tl.zeros((GROUPS, BLOCK_O, BLOCK_T), tl.float32)
    # Joined, so that the compiler gives x the layout that it has in the products of integers.
    one = tl.full((GROUPS, 16, 8), 1.0, tl.float32 if INTERPRETED else tl.bfloat16)
    ones = tl.reshape(tl.join(one, one), (GROUPS, 16, 16))
    there = (begin + g < groups)[:, None]
    scale_0, minimum_0 = scale_and_minimum(
        scales_at, there, 0, PARTS, HAS_MINIMUM, SCALE_BITS, COLUMNS
    )
    scale_1, minimum_1 = scale_0, minimum_0
    if PARTS == 2:
        scale_1, minimum_1 = scale_and_minimum(
            scales_at, there, 1, PARTS, HAS_MINIMUM, SCALE_BITS, COLUMNS
        )
    for first in range(begin, end, GROUPS):
        here = (first + g < groups)[:, None, None] | WHOLE
        u_0 = tl.load(u_at, here, other=0)
        u_1 = u_0
        if BITS == 8:
            u_1 = tl.load(u_at + 16 * COLUMNS, here, other=0)
        x_0 = _operand(x_at, here, INTERPRETED)
        x_1 = _operand(x_at + 16, here, INTERPRETED)
        u_at += GROUPS * BLOCK_BYTES
        x_at += GROUPS * INPUTS
        scales_at += GROUPS * BLOCK_BYTES
        # Those of the next groups: they come straight from memory, while these are multiplied.
        there = (first + GROUPS + g < groups)[:, None]
        next_0, next_minimum_0 = scale_and_minimum(
            scales_at, there, 0, PARTS, HAS_MINIMUM, SCALE_BITS, COLUMNS
        )
        next_1, next_minimum_1 = next_0, next_minimum_0
        if PARTS == 2:
            next_1, next_minimum_1 = scale_and_minimum(
                scales_at, there, 1, PARTS, HAS_MINIMUM, SCALE_BITS, COLUMNS
            )
        total = add_groups(
            total, u_0, u_1, x_0, x_1, ones, scale_0, minimum_0, scale_1, minimum_1,
            BITS, HAS_MINIMUM, PARTS, INTERPRETED,
        )  # fmt: skip
        scale_0, minimum_0 = next_0, next_minimum_0
        scale_1, minimum_1 = next_1, next_minimum_1
    return sum_of_groups(total)


@triton.jit(do_not_specialize=SIZES)
def quantized_linear_kernel(
    x, weight, bias, out, partials, arrived, T, o_units, groups, x_units, out_units, parts,
    part_inputs, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, ONE_PART: tl.constexpr,
    INTERPRETED: tl.constexpr, WHOLE: tl.constexpr,
    BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PARTS: tl.constexpr, SCALE_BITS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    ALIGNMENT: tl.constexpr, OUT_ALIGNMENT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As linear.linear_kernel, of packed weights: `parts` of K, PARTS of a group."""
    Out = o_units * OUT_ALIGNMENT
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(Out, BLOCK_O)
    tile = tl.program_id(0) % tiles
    t_tile, o_tile = tile_of(tile, T, Out, BLOCK_T, BLOCK_O, GROUP)
    first_t, first_o = t_tile * BLOCK_T, o_tile * BLOCK_O
    # Rows that do not exist are copies of others.
    o = first_o + tl.arange(0, BLOCK_O)
    block = tl.minimum(o // COLUMNS, (Out - 1) // COLUMNS)
    records = weight + block.to(tl.int64) * (groups * BLOCK_BYTES)
    t = tl.minimum(first_t + tl.arange(0, BLOCK_T), T - 1)
    x_rows = x + t.to(tl.int64) * (x_units * ALIGNMENT)
    part_groups = part_inputs // INPUTS
    is_last = True
    if SPLIT:
        part = tl.program_id(0) // tiles
        begin = part * part_groups
        acc = _product(
            x_rows, records, o % COLUMNS, begin, tl.minimum(begin + part_groups, groups), groups,
            BITS, HAS_MINIMUM, PARTS, SCALE_BITS, BLOCK_BYTES, COLUMNS, INPUTS, INTERPRETED,
            WHOLE, BLOCK_T, BLOCK_O, GROUPS,
        )  # fmt: skip
        acc, is_last = sum_of_parts(acc, partials, arrived, tile, part, parts, BLOCK_T, BLOCK_O)
    elif ONE_PART:
        acc = _product(
            x_rows, records, o % COLUMNS, 0, groups, groups,
            BITS, HAS_MINIMUM, PARTS, SCALE_BITS, BLOCK_BYTES, COLUMNS, INPUTS, INTERPRETED,
            WHOLE, BLOCK_T, BLOCK_O, GROUPS,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for part in range(parts):
            begin = part * part_groups
            acc += _product(
                x_rows, records, o % COLUMNS, begin, tl.minimum(begin + part_groups, groups),
                groups, BITS, HAS_MINIMUM, PARTS, SCALE_BITS, BLOCK_BYTES, COLUMNS, INPUTS,
                INTERPRETED, WHOLE, BLOCK_T, BLOCK_O, GROUPS,
            )  # fmt: skip
    if is_last:
        out_stride = out_units * OUT_ALIGNMENT
        store_tile(acc, bias, out, first_t, first_o, T, Out, out_stride, HAS_BIAS, BLOCK_T, BLOCK_O)


@triton.jit(do_not_specialize=["rows", "groups", "out_units"])
def quantized_embedding_kernel(
    token_ids, weight, out, rows, groups, out_units,
    BITS: tl.constexpr, HAS_MINIMUM: tl.constexpr, PARTS: tl.constexpr, SCALE_BITS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """GROUPS of 32 inputs of a row; NaN if there is no such row."""
    token = tl.load(token_ids + tl.program_id(0))
    known = (token >= 0) & (token < rows)
    row = tl.where(known, token, 0)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    records = weight + (row // COLUMNS * groups + g) * BLOCK_BYTES
    weights = load_weights(
        records, row % COLUMNS, known & (g < groups), BITS, HAS_MINIMUM, PARTS, SCALE_BITS, INPUTS,
        COLUMNS,
    )  # fmt: skip
    at = out + tl.program_id(0).to(tl.int64) * (out_units * OUT_ALIGNMENT) + g * INPUTS
    weights = tl.where(known, weights, float("nan"))
    tl.store(at + tl.arange(0, INPUTS)[None, :], weights, g < groups)


def declines(facts: KernelFacts) -> str | None:
    return lacks_tensor_cores(facts)


def tiling(tokens: int, bits: int, itemsize: int, on: Hardware) -> Tiling:
    """What the launcher and `builds` give the kernel; `itemsize` is that of x. It fits in 99 KB."""
    block_t, block_o = (16, 64) if tokens <= 16 else (32, 32) if tokens <= 32 else (64, 32)
    stage = GROUPS * GROUP * (block_o * bits // 8 + block_t * itemsize)
    most = 6 if on.capability < 100 else 4  # with more, registers spill on sm_100
    stages = max(2, min(most, STAGE_MEMORY // stage))
    return Tiling(block_t, block_o, GROUPS * GROUP, GROUPS, stages)


def constants(
    tile: Tiling,
    fmt: PackedFormat,
    *,
    bias: bool,
    split: bool,
    parts: int,
    interpreted: bool,
    whole: bool,
    aligned: int,
    out_aligned: int,
) -> dict[str, int | bool]:
    return {
        **format_constants(fmt),
        "HAS_BIAS": bias,
        "SPLIT": split,
        "ONE_PART": parts == 1,
        "INTERPRETED": interpreted,
        "WHOLE": whole,
        "ALIGNMENT": aligned,
        "OUT_ALIGNMENT": out_aligned,
        "BLOCK_T": tile.block_t,
        "BLOCK_O": tile.block_o,
        "GROUPS": GROUPS,
        "GROUP": GROUP_TILES,
    }


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    fmt: PackedFormat,
    activation_bits: int,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/quantized_linear.py. A row's bits do not depend on T, for every T.

    x is rounded to bf16 whatever `activation_bits` are: nearer to x than 8 bits, and no slower.
    """
    (tokens, inputs), outputs = x.shape, out.shape[1]
    if tokens == 0 or outputs == 0:
        return
    if not x.is_cuda:
        x = x.bfloat16().float()  # the interpreter truncates, and cannot multiply bf16
    elif x.stride(1) != 1:
        x = x.contiguous()
    parts, part_inputs = parts_of(outputs, inputs)
    tile = tiling(tokens, fmt.bits, x.element_size(), hardware(x.device))
    split = splits(tokens, outputs, parts, tile, SPLIT_PROGRAMS)
    fixed = constants(
        tile,
        fmt,
        bias=bias is not None,
        split=split,
        parts=parts,
        interpreted=not x.is_cuda,
        whole=inputs % (GROUPS * GROUP) == 0,
        aligned=alignment(x.stride(0)),
        out_aligned=alignment(outputs, out.stride(0)),
    )
    partials, arrived = scratch(x.device)
    quantized_linear_kernel[(tiles_of(tokens, outputs, tile) * (parts if split else 1),)](
        x,
        weight,
        out if bias is None else bias,
        out,
        partials,
        arrived,
        tokens,
        outputs // fixed["OUT_ALIGNMENT"],
        inputs // GROUP,
        x.stride(0) // fixed["ALIGNMENT"],
        out.stride(0) // fixed["OUT_ALIGNMENT"],
        parts,
        part_inputs,
        **fixed,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def quantized_embedding(token_ids: Tensor, weight: Tensor, fmt: PackedFormat, out: Tensor) -> None:
    """See ops/quantized_linear.py."""
    blocks, groups, _ = weight.shape
    if not out.numel():
        return
    aligned = alignment(out.stride(0))
    quantized_embedding_kernel[(len(token_ids), triton.cdiv(groups, EMBEDDING_GROUPS))](
        token_ids,
        weight,
        out,
        blocks * COLUMNS,
        groups,
        out.stride(0) // aligned,
        **format_constants(fmt),
        OUT_ALIGNMENT=aligned,
        GROUPS=EMBEDDING_GROUPS,
        num_warps=4,
    )


def _cases() -> Iterator[tuple[PackedFormat, int, tuple[int, int], str]]:
    """(format, tokens, shape of the matrix, type of x) of the builds."""
    wide, square = (28672, 4096), (4096, 4096)
    for tokens, shape in ((16, square), (16, wide), (32, square), (64, square), (2048, wide)):
        yield MINIMUM, tokens, shape, "bf16"
    for fmt in (PackedFormat(4, False), PackedFormat(8, False)):
        for tokens in (16, 64):
            yield fmt, tokens, square, "bf16"
    for tokens in (16, 64):
        yield MINIMUM, tokens, square, "fp32"
    yield PackedFormat(8, True, scale_bits=32), 16, square, "bf16"
    yield PackedFormat(4, True, 16, scale_bits=32), 16, square, "bf16"
    yield MINIMUM, 16, (576, 576), "fp32"


def builds(arch: str) -> Iterator[Build]:
    """Four-bit weights with and without a minimum for few to many tokens, other formats for few.

    Sizes are no constants: SmolLM2-135M, Llama-3.1-8B and Qwen3 share these.
    """
    for fmt, tokens, (outputs, inputs), x in _cases():
        parts, _ = parts_of(outputs, inputs)
        tile = tiling(tokens, fmt.bits, 4 if x == "fp32" else 2, hardware_of(arch))
        split = splits(tokens, outputs, parts, tile, SPLIT_PROGRAMS)
        whole = inputs % (GROUPS * GROUP) == 0
        tail = ", split" * split + ", a last step that is not full" * (not whole)
        yield Build(
            name=f"{describe(fmt)}, {x}, {tokens} tokens{tail}",
            kernel=quantized_linear_kernel,
            types={
                **dict.fromkeys(("x", "bias"), f"*{x}"),
                "out": "*fp32" if x == "fp32" else "*bf16",
                "weight": "*u8",
                "partials": "*fp32",
                "arrived": "*i32",
                **dict.fromkeys(SIZES, "i32"),
            },
            constants=constants(
                tile,
                fmt,
                bias=False,
                split=split,
                parts=parts,
                interpreted=False,
                whole=whole,
                aligned=16,
                out_aligned=16,
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            expects=("cp.async", "mma.sync.aligned.m16n8k16"),
        )
    yield dequantize_build(MINIMUM)
    yield Build(
        name=f"rows of {describe(MINIMUM)}",
        kernel=quantized_embedding_kernel,
        types={
            "token_ids": "*i64",
            "weight": "*u8",
            "out": "*fp32",
            **dict.fromkeys(("rows", "groups", "out_units"), "i32"),
        },
        constants={
            **format_constants(MINIMUM),
            "OUT_ALIGNMENT": 16,
            "GROUPS": EMBEDDING_GROUPS,
        },
    )


def describe(fmt: PackedFormat) -> str:
    minimum = " and minimum" * fmt.has_minimum
    return f"{fmt.bits} bits, fp{fmt.scale_bits} scale{minimum} per {fmt.inputs_per_scale}"
