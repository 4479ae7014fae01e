"""Dense matrix products, in one order of K for every number of tokens.

For 4096 x 4096 weights in bf16 an H200 needs 7.8 us to read them and, of 64 tokens, 2.7 us to
multiply: up to 64 tokens all that counts is bytes on their way. So K is split until every
multiprocessor streams, tiles of x are as low as they can be, and TMA fetches where rows are aligned
(sm_90 and later), cp.async elsewhere. From some hundred tokens on arithmetic counts: larger tiles,
in an order that finds weights in the L2 cache, and no split. Why bits agree: see gemm_tiles.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace_kernels.dispatch import KernelFacts
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ["T", "o_units", "in_units", "x_units", "weight_units", "out_units", "parts", "part_inputs"]


@triton.jit
def _product(
    acc, x, weight, first_t, first_o, k_begin, k_end, T, Out, In, x_stride, weight_stride,
    TMA: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + weight[outputs, k_begin:k_end] @ x[tokens, k_begin:k_end].T"""
    for k in range(k_begin, k_end, BLOCK_K):
        w_tile = load_tile(weight, first_o, k, Out, In, weight_stride, TMA, BLOCK_O, BLOCK_K)
        x_tile = load_tile(x, first_t, k, T, In, x_stride, TMA, BLOCK_T, BLOCK_K)
        acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=SIZES)
def linear_kernel(
    x, weight, bias, out, partials, arrived, T, o_units, in_units, x_units, weight_units, out_units,
    parts, part_inputs, HAS_BIAS: tl.constexpr, TMA: tl.constexpr, SPLIT: tl.constexpr,
    ONE_PART: tl.constexpr, ALIGNMENT: tl.constexpr, OUT_ALIGNMENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_O, BLOCK_T] of weight @ x.T; with SPLIT one part of one.

    x and weight are descriptors with TMA, else pointers. Lengths of rows and what lies between
    their starts come in units of ALIGNMENT, so that the compiler knows how wide loads may be.
    """
    Out = o_units * OUT_ALIGNMENT
    tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(Out, BLOCK_O)
    tile = tl.program_id(0) % tiles
    t_tile, o_tile = tile_of(tile, T, Out, BLOCK_T, BLOCK_O, GROUP)
    first_t, first_o = t_tile * BLOCK_T, o_tile * BLOCK_O
    In = in_units * ALIGNMENT
    x_stride, weight_stride = x_units * ALIGNMENT, weight_units * ALIGNMENT
    acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    is_last = True
    if SPLIT:
        part = tl.program_id(0) // tiles
        begin = tl.multiple_of(part * part_inputs, BLOCK_K)
        acc = _product(
            acc, x, weight, first_t, first_o, begin, tl.minimum(begin + part_inputs, In), T, Out,
            In, x_stride, weight_stride, TMA, BLOCK_T, BLOCK_O, BLOCK_K,
        )  # fmt: skip
        acc, is_last = sum_of_parts(acc, partials, arrived, tile, part, parts, BLOCK_T, BLOCK_O)
    elif ONE_PART:
        acc = _product(
            acc, x, weight, first_t, first_o, 0, In, T, Out, In, x_stride, weight_stride,
            TMA, BLOCK_T, BLOCK_O, BLOCK_K,
        )  # fmt: skip
    else:
        for part in range(parts):
            begin = tl.multiple_of(part * part_inputs, BLOCK_K)
            acc += _product(
                tl.zeros((BLOCK_O, BLOCK_T), tl.float32), x, weight, first_t, first_o, begin,
                tl.minimum(begin + part_inputs, In), T, Out, In, x_stride, weight_stride,
                TMA, BLOCK_T, BLOCK_O, BLOCK_K,
            )  # fmt: skip
    if is_last:
        out_stride = out_units * OUT_ALIGNMENT
        store_tile(acc, bias, out, first_t, first_o, T, Out, out_stride, HAS_BIAS, BLOCK_T, BLOCK_O)


def declines(facts: KernelFacts) -> str | None:
    if facts.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {facts.dtype}"
    if facts.device == "cpu" and facts.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return lacks_tensor_cores(facts)


def tiling(tokens: int, outputs: int, parts: int, itemsize: int, on: Hardware) -> Tiling:
    """What the launcher and `builds` give the kernel. Three stages or more fit in 99 KB."""
    if itemsize == 4:
        return Tiling(16 if tokens <= 16 else 64, 64, 32, 4, 3)
    if tokens <= 16:
        # As much on its way as fits twice on a multiprocessor, or four times if programs are many.
        return Tiling(16, 64, 64, 4, 8 if parts > 1 else 5)
    if tokens <= 32:
        return Tiling(32, 64, 64, 4, 6 if parts > 1 else 4)
    if tokens <= 64:
        return Tiling(64, 128, 64, 4, 4)
    if on.large_shared and parts == 1 and tokens >= 1024:
        return Tiling(256, 128, 64, 8, 4)
    return Tiling(128, 128, 64, 8, 3)


def constants(
    tile: Tiling, *, bias: bool, tma: bool, split: bool, parts: int, aligned: int, out_aligned: int
) -> dict[str, int | bool]:
    return {
        "HAS_BIAS": bias,
        "TMA": tma,
        "SPLIT": split,
        "ONE_PART": parts == 1,
        "ALIGNMENT": aligned,
        "OUT_ALIGNMENT": out_aligned,
        "BLOCK_T": tile.block_t,
        "BLOCK_O": tile.block_o,
        "BLOCK_K": tile.block_k,
        "GROUP": GROUP_TILES,
    }


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ops/linear.py. A row's bits do not depend on T, for every T."""
    (tokens, inputs), outputs = x.shape, len(weight)
    if tokens == 0 or outputs == 0:
        return
    x, weight = (m if m.stride(1) == 1 else m.contiguous() for m in (x, weight))
    parts, part_inputs = parts_of(outputs, inputs)
    tma = fetched_by_tma(x, weight)
    tile = tiling(tokens, outputs, parts, x.element_size(), hardware(x.device))
    split = splits(tokens, outputs, parts, tile)
    aligned = alignment(inputs, x.stride(0), weight.stride(0))
    fixed = constants(
        tile,
        bias=bias is not None,
        tma=tma,
        split=split,
        parts=parts,
        aligned=aligned,
        out_aligned=alignment(outputs, out.stride(0)),
    )
    partials, arrived = scratch(x.device)
    linear_kernel[(tiles_of(tokens, outputs, tile) * (parts if split else 1),)](
        TensorDescriptor.from_tensor(x, [tile.block_t, tile.block_k]) if tma else x,
        TensorDescriptor.from_tensor(weight, [tile.block_o, tile.block_k]) if tma else weight,
        out if bias is None else bias,
        out,
        partials,
        arrived,
        tokens,
        outputs // fixed["OUT_ALIGNMENT"],
        inputs // aligned,
        x.stride(0) // aligned,
        weight.stride(0) // aligned,
        out.stride(0) // fixed["OUT_ALIGNMENT"],
        parts,
        part_inputs,
        **fixed,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def builds(arch: str) -> Iterator[Build]:
    """For 1 to 16, 32, 64 and many tokens: with and without a split, in bf16; a head's fp32 output.

    SmolLM2-135M, Llama-3.1-8B and Qwen3 share these: sizes are no constants.
    """
    wide, square = (28672, 4096), (4096, 4096)
    for name, tokens, (outputs, inputs), out, bias in (
        ("16 tokens, split", 16, square, "bf16", False),
        ("16 tokens, split, bias", 16, square, "bf16", True),
        ("16 tokens", 16, wide, "bf16", False),
        ("16 tokens, fp32 out", 16, wide, "fp32", False),
        ("32 tokens, split", 32, square, "bf16", False),
        ("64 tokens, split", 64, square, "bf16", False),
        ("64 tokens, fp32 out", 64, wide, "fp32", False),
        ("512 tokens", 512, wide, "bf16", False),
        ("2048 tokens", 2048, wide, "bf16", False),
        ("2048 tokens, parts", 2048, square, "bf16", False),
    ):
        parts, _ = parts_of(outputs, inputs)
        tma = hardware_of(arch).tma
        tile = tiling(tokens, outputs, parts, 2, hardware_of(arch))
        tensors = ("*bf16", "*bf16")
        if tma:
            tensors = tuple(
                f"tensordesc<bf16[{rows},{tile.block_k}]>" for rows in (tile.block_t, tile.block_o)
            )
        yield Build(
            name=name,
            kernel=linear_kernel,
            types={
                **dict(zip(("x", "weight"), tensors, strict=True)),
                "bias": "*bf16",
                "out": f"*{out}",
                "partials": "*fp32",
                "arrived": "*i32",
                **dict.fromkeys(SIZES, "i32"),
            },
            constants=constants(
                tile,
                bias=bias,
                tma=tma,
                split=splits(tokens, outputs, parts, tile),
                parts=parts,
                aligned=16,
                out_aligned=16,
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            expects=EXPECTS.get(arch, ()),
        )
