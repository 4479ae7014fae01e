"""Products of int8 or e4m3 rows with weights of that type and their scales.

Half the bytes of bf16: 4096 x 4096 weights take an H200 3.9 us to read. So tiles, splits and loads
are those of linear.py with twice the inputs in a tile. Tensor cores of sm_90 keep sums of e4m3
products to 14 bits, so each 128 inputs are summed anew and added to the rest in fp32, which is
where block scales go (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Sums of int8 products are
exact. Why a row's bits depend on that row only: see gemm_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import scaled_linear as reference
from headrace_kernels.triton.builds import Build
from headrace_kernels.triton.gemm_tiles import (
    EXPECTS,
    GROUP_TILES,
    Hardware,
    Tiling,
    alignment,
    fetched_by_tma,
    hardware,
    hardware_of,
    lacks_tensor_cores,
    load_tile,
    parts_of,
    scratch,
    splits,
    store_tile,
    sum_of_parts,
    tile_of,
    tiles_of,
)

SIZES = ["T", "o_units", "in_units", "x_units", "weight_units", "out_units", "x_scale_stride"]
SIZES += ["parts", "part_inputs"]
BLOCK_SCALE = tl.constexpr(128)
"""Inputs, and outputs, of a block of weights; inputs whose e4m3 products are summed at once."""


@triton.jit
def _product(
    x, weight, x_scale, weight_scale, first_t, first_o, k_begin, k_end, T, Out, In,
    x_stride, weight_stride, x_scale_stride,
    TMA: tl.constexpr, BLOCK_SCALES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """weight[outputs, k_begin:k_end] @ x[tokens, k_begin:k_end].T, with block scales applied."""
    IS_INT: tl.constexpr = x.dtype == tl.int8 if TMA else x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INT else tl.float32
    zeros = tl.zeros((BLOCK_O, BLOCK_T), SUM)
    acc = tl.zeros((BLOCK_O, BLOCK_T), SUM if IS_INT and not BLOCK_SCALES else tl.float32)
    t = tl.minimum(first_t + tl.arange(0, BLOCK_T), T - 1)
    x_scales = x_scale + t.to(tl.int64) * x_scale_stride
    # A tile of outputs lies within a block.
    weight_scales = weight_scale + first_o // BLOCK_SCALE * (In // BLOCK_SCALE)
    for k in range(k_begin, k_end, BLOCK_SCALE):
        w_tile = load_tile(weight, first_o, k, Out, In, weight_stride, TMA, BLOCK_O, BLOCK_SCALE)
        x_tile = load_tile(x, first_t, k, T, In, x_stride, TMA, BLOCK_T, BLOCK_SCALE)
        if BLOCK_SCALES:
            block = k // BLOCK_SCALE
            scale = tl.load(x_scales + block) * tl.load(weight_scales + block)
            products = tl.dot(w_tile, tl.trans(x_tile), zeros, out_dtype=SUM)
            wide_scale = tl.broadcast_to(scale[None, :], acc.shape)
            acc = tl.fma(products.to(tl.float32), wide_scale, acc)
        elif IS_INT:
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, out_dtype=SUM)
        else:
            acc += tl.dot(w_tile, tl.trans(x_tile), zeros, out_dtype=SUM)
    return acc.to(tl.float32)


@triton.jit
def _scale_rows(acc, x_scale, weight_scale, first_t, first_o, T, Out, x_scale_stride,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """acc[outputs, tokens] times the scale of the output and that of the token."""
    t = tl.minimum(first_t + tl.arange(0, BLOCK_T), T - 1)
    o = tl.minimum(first_o + tl.arange(0, BLOCK_O), Out - 1)
    acc *= tl.load(x_scale + t.to(tl.int64) * x_scale_stride)[None, :]
    return acc * tl.load(weight_scale + o)[:, None]


@triton.jit(do_not_specialize=SIZES)
def scaled_linear_kernel(
    x, weight, x_scale, weight_scale, bias, out, partials, arrived, T, o_units, in_units, x_units,
    weight_units, out_units, x_scale_stride, parts, part_inputs,
    HAS_BIAS: tl.constexpr, BLOCK_SCALES: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    ONE_PART: tl.constexpr, ALIGNMENT: tl.constexpr, OUT_ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As linear.linear_kernel, with scales."""
    Out = o_units * OUT_ALIGNMENT
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(Out, BLOCK_O)
    tile = tl.program_id(0) % tiles
    t_tile, o_tile = tile_of(tile, T, Out, BLOCK_T, BLOCK_O, GROUP)
    first_t, first_o = t_tile * BLOCK_T, o_tile * BLOCK_O
    In = in_units * ALIGNMENT
    x_stride, weight_stride = x_units * ALIGNMENT, weight_units * ALIGNMENT
    is_last = True
    if SPLIT:
        part = tl.program_id(0) // tiles
        begin = tl.multiple_of(part * part_inputs, BLOCK_SCALE)
        acc = _product(
            x, weight, x_scale, weight_scale, first_t, first_o, begin,
            tl.minimum(begin + part_inputs, In), T, Out, In, x_stride, weight_stride,
            x_scale_stride, TMA, BLOCK_SCALES, BLOCK_T, BLOCK_O,
        )  # fmt: skip
        acc, is_last = sum_of_parts(acc, partials, arrived, tile, part, parts, BLOCK_T, BLOCK_O)
    elif ONE_PART:
        acc = _product(
            x, weight, x_scale, weight_scale, first_t, first_o, 0, In, T, Out, In, x_stride,
            weight_stride, x_scale_stride, TMA, BLOCK_SCALES, BLOCK_T, BLOCK_O,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for part in range(parts):
            begin = tl.multiple_of(part * part_inputs, BLOCK_SCALE)
            acc += _product(
                x, weight, x_scale, weight_scale, first_t, first_o, begin,
                tl.minimum(begin + part_inputs, In), T, Out, In, x_stride, weight_stride,
                x_scale_stride, TMA, BLOCK_SCALES, BLOCK_T, BLOCK_O,
            )  # fmt: skip
    if is_last:
        if not BLOCK_SCALES:
            acc = _scale_rows(
                acc, x_scale, weight_scale, first_t, first_o, T, Out, x_scale_stride,
                BLOCK_T, BLOCK_O,
            )  # fmt: skip
        out_stride = out_units * OUT_ALIGNMENT
        store_tile(acc, bias, out, first_t, first_o, T, Out, out_stride, HAS_BIAS, BLOCK_T, BLOCK_O)


def declines(facts: KernelFacts) -> str | None:
    return lacks_tensor_cores(facts)


def tiling(tokens: int, parts: int, block_scales: bool, on: Hardware) -> Tiling:
    """What the launcher and `builds` give the kernel. All of them fit in 99 KB."""
    if tokens <= 16:
        return Tiling(16, 64, 128, 4, 8 if parts > 1 else 5)
    if tokens <= 32:
        return Tiling(32, 64, 128, 4, 6 if parts > 1 else 4)
    if tokens <= 64:
        return Tiling(64, 128, 128, 4, 4)
    if block_scales and on.capability != 90:
        return Tiling(64, 128, 128, 8, 4)  # the sums of a block and of all would spill
    return Tiling(128, 128, 128, 8, 3)


def constants(
    tile: Tiling,
    *,
    bias: bool,
    block_scales: bool,
    tma: bool,
    split: bool,
    parts: int,
    aligned: int,
    out_aligned: int,
) -> dict[str, int | bool]:
    return {
        "HAS_BIAS": bias,
        "BLOCK_SCALES": block_scales,
        "TMA": tma,
        "SPLIT": split,
        "ONE_PART": parts == 1,
        "ALIGNMENT": aligned,
        "OUT_ALIGNMENT": out_aligned,
        "BLOCK_T": tile.block_t,
        "BLOCK_O": tile.block_o,
        "GROUP": GROUP_TILES,
    }


def scaled_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """See ops/scaled_linear.py. A row's bits do not depend on T, for every T.

    GPUs that cannot convert e4m3, those before sm_89, compute it by the reference.
    """
    (tokens, inputs), outputs = x.shape, len(weight)
    if tokens == 0 or outputs == 0:
        return
    if x.dtype == torch.float8_e4m3fn and not hardware(x.device).e4m3:
        reference.scaled_linear(x, x_scale, weight, weight_scale, bias, out)
        return
    x, weight, x_scale = (m if m.stride(1) == 1 else m.contiguous() for m in (x, weight, x_scale))
    parts, part_inputs = parts_of(outputs, inputs)
    tma = fetched_by_tma(x, weight)
    block_scales = weight_scale.shape != (outputs, 1)
    tile = tiling(tokens, parts, block_scales, hardware(x.device))
    split = splits(tokens, outputs, parts, tile)
    fixed = constants(
        tile,
        bias=bias is not None,
        block_scales=block_scales,
        tma=tma,
        split=split,
        parts=parts,
        aligned=alignment(inputs, x.stride(0), weight.stride(0)),
        out_aligned=alignment(outputs, out.stride(0)),
    )
    partials, arrived = scratch(x.device)
    scaled_linear_kernel[(tiles_of(tokens, outputs, tile) * (parts if split else 1),)](
        TensorDescriptor.from_tensor(x, [tile.block_t, tile.block_k]) if tma else x,
        TensorDescriptor.from_tensor(weight, [tile.block_o, tile.block_k]) if tma else weight,
        x_scale,
        weight_scale.contiguous(),
        out if bias is None else bias,
        out,
        partials,
        arrived,
        tokens,
        outputs // fixed["OUT_ALIGNMENT"],
        inputs // fixed["ALIGNMENT"],
        x.stride(0) // fixed["ALIGNMENT"],
        weight.stride(0) // fixed["ALIGNMENT"],
        out.stride(0) // fixed["OUT_ALIGNMENT"],
        x_scale.stride(0),
        parts,
        part_inputs,
        **fixed,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def builds(arch: str) -> Iterator[Build]:
    """One or both types for few to many tokens, with and without a split; sizes are no constants.

    Outputs in bf16, no bias: as SmolLM2-135M, Llama-3.1-8B and Qwen3 multiply.
    """
    wide, square = (28672, 4096), (4096, 4096)
    on = hardware_of(arch)
    types = ("i8", "fp8e4nv") if on.e4m3 else ("i8",)
    for tokens, (outputs, inputs), block_scales in (
        (16, square, False),
        (16, wide, False),
        (64, square, False),
        (2048, wide, False),
        (16, square, True),
        (2048, wide, True),
    ):
        for kind in types:
            if block_scales and kind == "i8" and len(types) > 1:
                continue
            parts, _ = parts_of(outputs, inputs)
            tma, tile = on.tma, tiling(tokens, parts, block_scales, on)
            split = splits(tokens, outputs, parts, tile)
            tensors = (f"*{kind}", f"*{kind}")
            if tma:
                tensors = tuple(
                    f"tensordesc<{kind}[{rows},{tile.block_k}]>"
                    for rows in (tile.block_t, tile.block_o)
                )
            scales = "blocks" if block_scales else "rows"
            yield Build(
                name=f"{kind}, scales of {scales}, {tokens} tokens{', split' * split}",
                kernel=scaled_linear_kernel,
                types={
                    **dict(zip(("x", "weight"), tensors, strict=True)),
                    **dict.fromkeys(("x_scale", "weight_scale", "partials"), "*fp32"),
                    "bias": "*bf16",
                    "out": "*bf16",
                    "arrived": "*i32",
                    **dict.fromkeys(SIZES, "i32"),
                },
                constants=constants(
                    tile,
                    bias=False,
                    block_scales=block_scales,
                    tma=tma,
                    split=split,
                    parts=parts,
                    aligned=16,
                    out_aligned=16,
                ),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                # Triton multiplies int8 on sm_100 with the instruction of sm_80.
                expects=() if (arch, kind) == ("sm_100", "i8") else EXPECTS.get(arch, ()),
            )
