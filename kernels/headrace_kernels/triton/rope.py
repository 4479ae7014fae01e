"""QK-norm, rotation and the write into the cache: each value is read once and written once.

2k tokens of Llama-3.1-8B are 50 MB, 12 us at 4.3 TB/s; 64 tokens 1.5 MB, less than a launch. A
program takes some heads of a token, of q, k and v alike, as the two halves that are rotated and
what lies behind them, so that loads stay wide. A head is batch invariant because its program, its
place in it and its sums depend on the shape of the model only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.kv_format import row_size
from headrace_kernels.reference.quantization import LIMITS
from headrace_kernels.triton.builds import Build
from headrace_kernels.triton.quantization import (
    WIDE_LOADS,
    check_layout,
    factor_and_scale,
    magnitude_bits,
    output_types,
    round_to_8_bits,
)

CHUNK = 2048
"""Values that a program takes."""
LARGEST_HEAD = 1024


def declines(facts: KernelFacts) -> str | None:
    if facts.head_dim > LARGEST_HEAD or facts.head_dim % 2:
        return f"takes even head sizes up to {LARGEST_HEAD}, not {facts.head_dim}"
    return None


@triton.jit
def _part(heads_ptr, exists, FIRST: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr):
    """The heads' values of COUNT columns from FIRST on: columns [1, S], which exist, values."""
    inside = tl.arange(0, S)
    columns = (FIRST + inside)[None, :]
    mask = exists[:, None] & (inside < COUNT)[None, :]
    return columns, mask, tl.load(heads_ptr[:, None] + columns, mask, other=0).to(tl.float32)


@triton.jit
def _sum_of_squares(first, second, rest):
    return tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)


@triton.jit
def _largest(first, second, rest):
    top = tl.maximum(tl.max(magnitude_bits(first), 1), tl.max(magnitude_bits(second), 1))
    return tl.maximum(top, tl.max(magnitude_bits(rest), 1))


@triton.jit
def _normed(x, root, q_norm_ptr, k_norm_ptr, columns, D: tl.constexpr, is_q, is_value):
    """Heads of q and k by their root mean square and their weights; those of v as they are."""
    q_weight = tl.load(q_norm_ptr + columns, columns < D, other=0).to(tl.float32)
    k_weight = tl.load(k_norm_ptr + columns, columns < D, other=0).to(tl.float32)
    weight = tl.where(is_q[:, None], q_weight, k_weight)
    return tl.where(is_value[:, None], x, x * root[:, None] * weight)


@triton.jit
def _rotated(first, second, table_ptr, is_value, HALF: tl.constexpr, S: tl.constexpr):
    """Pairs of q and k turned by a row [2, HALF] of cosines and sines; those of v as they are."""
    column = tl.arange(0, S)
    cos = tl.load(table_ptr + column, column < HALF, other=0)[None, :]
    sin = tl.load(table_ptr + HALF + column, column < HALF, other=0)[None, :]
    turned = tl.where(is_value[:, None], first, first * cos - second * sin)
    return turned, tl.where(is_value[:, None], second, second * cos + first * sin)


@triton.jit
def _store(x, q_ptr, row_ptr, columns, mask, is_q, in_cache, factor, LIMIT: tl.constexpr):
    """Heads of q as they are, those of k and v as the cache has them."""
    tl.store(q_ptr[:, None] + columns, x.to(q_ptr.dtype.element_ty), mask & is_q[:, None])
    if LIMIT != 0:
        x = round_to_8_bits(x, factor[:, None], LIMIT)
    x = x.to(row_ptr.dtype.element_ty)
    tl.store(row_ptr[:, None] + columns, x, mask & in_cache[:, None])


@triton.jit(do_not_specialize=["num_positions", "num_slots"])
def rope_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    cache_ptr,
    slots_ptr,
    q_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    num_positions,
    num_slots,
    QKV_STRIDE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALF_SIZE: tl.constexpr,
    REST_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
    N: tl.constexpr,
    LIMIT: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    exists, is_q, is_value = head < H + 2 * K, head < H, head >= H + K
    heads_ptr = qkv_ptr + token * QKV_STRIDE + head * D
    columns_1, mask_1, first = _part(heads_ptr, exists, 0, HALF, HALF_SIZE)
    columns_2, mask_2, second = _part(heads_ptr, exists, HALF, HALF, HALF_SIZE)
    # What lies behind the rotated values; if nothing does, one value that does not exist.
    columns_3, mask_3, rest = _part(heads_ptr, exists, 2 * HALF, D - 2 * HALF, REST_SIZE)
    if q_norm_ptr is not None:
        root = tl.rsqrt(_sum_of_squares(first, second, rest) / D + eps)
        first = _normed(first, root, q_norm_ptr, k_norm_ptr, columns_1, D, is_q, is_value)
        second = _normed(second, root, q_norm_ptr, k_norm_ptr, columns_2, D, is_q, is_value)
        rest = _normed(rest, root, q_norm_ptr, k_norm_ptr, columns_3, D, is_q, is_value)
    if ROTATES:
        position = tl.minimum(tl.maximum(tl.load(positions_ptr + token), 0), num_positions - 1)
        table_ptr = cos_sin_ptr + position * 2 * HALF
        first, second = _rotated(first, second, table_ptr, is_value, HALF, HALF_SIZE)

    slot = tl.load(slots_ptr + token)
    in_cache = exists & (head >= H) & (slot >= 0) & (slot < num_slots)
    kv_head = (tl.where(is_value, head - K, head) - H).to(tl.int64)
    page_ptr = cache_ptr + slot // PAGE * BLOCK_STRIDE + kv_head * HEAD_STRIDE
    page_ptr += tl.where(is_value, VALUE_STRIDE, 0)
    factor = tl.zeros([N], tl.float32)
    if LIMIT != 0:
        factor, scale = factor_and_scale(_largest(first, second, rest), LIMIT)
        scales_ptr = (page_ptr + PAGE * D).to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(scales_ptr + slot % PAGE, scale, in_cache)
    row_ptr = page_ptr + slot % PAGE * ROW_STRIDE
    q_ptr += (token * H + head) * D
    _store(first, q_ptr, row_ptr, columns_1, mask_1, is_q, in_cache, factor, LIMIT)
    _store(second, q_ptr, row_ptr, columns_2, mask_2, is_q, in_cache, factor, LIMIT)
    _store(rest, q_ptr, row_ptr, columns_3, mask_3, is_q, in_cache, factor, LIMIT)


def rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    q_out: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """See ops/rope.py."""
    tokens, heads, head_dim = q_out.shape
    if not tokens:
        return
    blocks, _, kv_heads, page_size, size = kv_cache.shape
    check_layout(positions=positions, slot_mapping=slot_mapping, cos_sin=cos_sin, q_out=q_out)
    check_layout(q_norm=q_norm, k_norm=k_norm)
    check_layout(adjacent=True, qkv=qkv, kv_cache=kv_cache)
    if kv_cache.dtype in LIMITS and kv_cache.stride(3) != size:
        raise ValueError(f"8-bit pages must be contiguous, not of strides {kv_cache.stride()}")
    constants, programs, num_warps = _configuration(
        heads, kv_heads, head_dim, cos_sin.shape[-1], page_size, kv_cache.dtype, kv_cache.stride()
    )
    rope_kernel[tokens, programs](
        qkv,
        positions,
        cos_sin,
        kv_cache,
        slot_mapping,
        q_out,
        q_norm,
        k_norm,
        eps,
        len(cos_sin),
        blocks * page_size,
        QKV_STRIDE=qkv.stride(0),
        **constants,
        num_warps=num_warps,
    )


def _configuration(
    heads: int,
    kv_heads: int,
    head_dim: int,
    half: int,
    page_size: int,
    cache_dtype: torch.dtype,
    cache_strides: Sequence[int],
) -> tuple[Mapping[str, Any], int, int]:
    """Constants of the kernel, programs of a token, and warps of a program."""
    quantized = cache_dtype in LIMITS
    pairs = half or head_dim // 2
    all_heads = heads + 2 * kv_heads
    taken = max(1, CHUNK // triton.next_power_of_2(head_dim))
    taken = min(taken, triton.next_power_of_2(all_heads))
    constants = {
        "BLOCK_STRIDE": cache_strides[0],
        "VALUE_STRIDE": cache_strides[1],
        "HEAD_STRIDE": cache_strides[2],
        "ROW_STRIDE": head_dim if quantized else cache_strides[3],
        "PAGE": page_size,
        "H": heads,
        "K": kv_heads,
        "D": head_dim,
        "HALF": pairs,
        "HALF_SIZE": triton.next_power_of_2(pairs),
        "REST_SIZE": triton.next_power_of_2(max(1, head_dim - 2 * pairs)),
        "ROTATES": half > 0,
        "N": taken,
        "LIMIT": LIMITS.get(cache_dtype, 0.0),
    }
    num_warps = min(4, max(1, taken * triton.next_power_of_2(head_dim) // 512))
    return constants, triton.cdiv(all_heads, taken), num_warps


MODELS = {
    "SmolLM2-135M": (9, 3, 64, 30, False),
    "Llama-3.1-8B": (32, 8, 128, 32, False),
    "Qwen3-0.6B": (16, 8, 128, 28, True),
    "Qwen3-8B": (32, 8, 128, 36, True),
}
"""(H, K, D, layers, whether with QK-norm)"""
PAGE_SIZE = 64


def builds(arch: str) -> Iterator[Build]:
    for model in MODELS:
        yield _build(model, "bf16", torch.bfloat16, "*bf16")
        for name, dtype, pointer in output_types(arch):
            yield _build(model, name, dtype, pointer)


def _build(model: str, name: str, cache_dtype: torch.dtype, pointer: str) -> Build:
    heads, kv_heads, head_dim, layers, qk_norm = MODELS[model]
    page = PAGE_SIZE * row_size(head_dim, cache_dtype)
    strides = (layers * 2 * kv_heads * page, kv_heads * page, page, page // PAGE_SIZE, 1)
    constants, _, num_warps = _configuration(
        heads, kv_heads, head_dim, head_dim // 2, PAGE_SIZE, cache_dtype, strides
    )
    norm = "*fp32" if qk_norm else None
    norms: Mapping[str, Any] = {"q_norm_ptr": norm, "k_norm_ptr": norm}
    types = {
        "qkv_ptr": "*bf16",
        "positions_ptr": "*i64",
        "cos_sin_ptr": "*fp32",
        "cache_ptr": pointer,
        "slots_ptr": "*i64",
        "q_ptr": "*bf16",
        "eps": "fp32",
        "num_positions": "i32",
        "num_slots": "i32",
        **{key: value for key, value in norms.items() if value},
    }
    return Build(
        name=f"{model} to {name}",
        kernel=rope_kernel,
        types=types,
        constants={
            "QKV_STRIDE": (heads + 2 * kv_heads) * head_dim,
            **constants,
            **{key: None for key, value in norms.items() if not value},
        },
        num_warps=num_warps,
        expects=WIDE_LOADS,
    )
