"""Paged attention on a GPU: one kernel for any mix of decode, extend and prefill, and a fold.

Decode of 64 x 4k at 8 kv heads of 128 reads 1.07 GB of bf16 KV, 0.25 ms at 4.3 TB/s: rows of a GQA
group share each load, and contexts are cut into chunks that are spread over all SMs. A causal
prompt of 8k at 32 heads is 0.55 TFLOP, 0.70 ms at 790 TFLOP/s: tensor cores must wait for no load,
so pages of 64 tokens come by TMA, and blocks have enough rows for wgmma.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.kv_format import values_and_scales
from headrace_kernels.triton.attention_kernel import attention_kernel, fold_kernel
from headrace_kernels.triton.attention_work import (
    WorkList,
    list_work_kernel,
    make_work_list,
    work_constants,
)
from headrace_kernels.triton.builds import Build

ROWS = 64
"""(query token, head) pairs of a block: the fewest that wgmma takes, for decode as for prefill."""
PAGE_TILE = 64
"""Cached tokens of a step where registers allow: a page of a GPU, one TMA box."""
CHUNK = 512
"""Cached tokens of a partial result. Another value gives other bits."""
UNIT = 8
"""Strides that are multiples of it are passed in its multiples, so that loads are vectors."""
NUM_STAGES = 3
"""Two buffers each of K and V, and the number of the page behind them."""
INTERPRETED_PROGRAMS = 3
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def declines(facts: KernelFacts) -> str | None:
    """See builds.py."""
    if facts.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, not {facts.dtype}"
    if not 16 <= facts.head_dim <= MAX_HEAD_DIM:
        return f"takes head sizes of 16 to {MAX_HEAD_DIM}, not {facts.head_dim}"
    return None


@dataclass(frozen=True)
class Layout:
    """How K and V of a cache are read: by TMA, as rows of a matrix, or by pointers."""

    cache: Tensor
    boxes: TensorDescriptor | None
    """Of `cache` as a matrix [rows, D], a tile high; None: there are none."""
    scales: Tensor | None
    strides: tuple[int, int, int]
    """From block to block, from K to V and from head to head: in rows, or in units of `unit`."""
    scale_strides: tuple[int, int, int]
    unit: int

    @property
    def by_descriptor(self) -> bool:
        return self.boxes is not None


def tile_tokens(head_dim: int, eight_bit: bool) -> int:
    """Half a page where V is wide, or passes through registers on its way to the tensor cores."""
    return PAGE_TILE // 2 if eight_bit or head_dim > 128 else PAGE_TILE


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Tensor,
    *,
    skip_decodes: bool = False,
) -> None:
    """See ops/attention.py. Raises ValueError if `scale` is not positive.

    `skip_decodes`: rows of requests of one query token are left as they are.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if out.numel() == 0 or metadata.seq_lens.shape[0] == 0:
        out.zero_()
        return
    if q.stride(-1) != 1 or out.stride(-1) != 1:
        dense = out.clone(memory_format=torch.contiguous_format)
        paged_attention(
            q.contiguous(), kv_cache, metadata, scale, sliding_window, soft_cap, dense,
            skip_decodes=skip_decodes,
        )  # fmt: skip
        out.copy_(dense)
        return
    layout = _layout(kv_cache, q, out)
    work = _work_list(q, kv_cache, metadata, sliding_window, skip_decodes)
    _attend(q, layout, work, metadata.block_table, scale, sliding_window, soft_cap, out)
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = kv_cache.shape[2]
    fold_kernel[(min(4 * _programs(q.device), num_tokens * kv_heads),)](
        work.counts,
        work.folds,
        out,
        work.partial,
        work.partial_stats,
        num_tokens,
        out.stride(0) // layout.unit,
        out.stride(1) // layout.unit,
        **fold_constants(num_heads, kv_heads, head_dim, layout),
    )


def _attend(
    q: Tensor,
    layout: Layout,
    work: WorkList,
    block_table: Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    out: Tensor,
) -> None:
    num_heads, head_dim = q.shape[1:]
    kv_heads, page_size = layout.cache.shape[2:4]
    log2_e = math.log2(math.e)
    attention_kernel[(min(_programs(q.device), work.items.shape[0] * kv_heads),)](
        work.counts,
        work.items,
        q,
        layout.cache if layout.boxes is None else layout.boxes,
        layout.cache,
        q if layout.scales is None else layout.scales,
        block_table,
        out,
        work.partial,
        work.partial_stats,
        work.totals,
        work.total_stats,
        q.stride(0) // layout.unit,
        q.stride(1) // layout.unit,
        out.stride(0) // layout.unit,
        out.stride(1) // layout.unit,
        *layout.strides,
        *layout.scale_strides,
        block_table.stride(0),
        sliding_window or 0,
        scale * log2_e if soft_cap is None else 1.0,
        0.0 if soft_cap is None else 2 * scale * log2_e / soft_cap,
        0.0 if soft_cap is None else -2 * soft_cap * log2_e,
        WINDOWED=sliding_window is not None,
        CAPPED=soft_cap is not None,
        **constants(num_heads, kv_heads, head_dim, page_size, layout),
        num_warps=num_warps(head_dim, _arch(q.device), layout),
        num_stages=NUM_STAGES,
    )


def num_warps(head_dim: int, arch: int, layout: Layout) -> int:
    """Four hold the accumulator of 64 rows of 128 on sm_90, if loads take no pointers.

    For sm_89 ptxas spills 8 bytes of bf16 the other way round.
    """
    if arch == 89 and layout.scales is None and head_dim <= 128:
        return 8 if head_dim < 128 else 4
    four = head_dim < 128 or (head_dim == 128 and arch == 90 and layout.by_descriptor)
    return 4 if four else 8


def constants(
    num_heads: int, kv_heads: int, head_dim: int, page_size: int, layout: Layout
) -> dict[str, int | bool]:
    """The constexpr arguments of attention_kernel that the shape of the model decides."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": num_heads // kv_heads,
        "ROWS": ROWS,
        "PAGE": page_size,
        "D": head_dim,
        "BLOCK_D": next_power_of_2(head_dim),
        "TILE": tile_tokens(head_dim, layout.scales is not None),
        "CHUNK": CHUNK,
        "UNIT": layout.unit,
        "CACHE_UNIT": head_dim if layout.by_descriptor else layout.unit,
        "BY_DESCRIPTOR": layout.by_descriptor,
        "SCALED": layout.scales is not None,
    }


def fold_constants(num_heads: int, kv_heads: int, head_dim: int, layout: Layout) -> dict[str, int]:
    """The constexpr arguments of fold_kernel."""
    group = num_heads // kv_heads
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "BLOCK_GROUP": next_power_of_2(group),
        "D": head_dim,
        "BLOCK_D": next_power_of_2(head_dim),
        "UNIT": layout.unit,
    }


def _work_list(
    q: Tensor,
    kv_cache: Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
    skip_decodes: bool,
) -> WorkList:
    """Made by the first layer of a step; those of another window or shape make their own."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, page_size = kv_cache.shape[2:4]
    key = ("triton", *q.shape, kv_heads, page_size, sliding_window, skip_decodes)
    work: WorkList | None = metadata.plans.get(key)
    if work is None:
        work = metadata.plans[key] = make_work_list(
            metadata,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            block_rows=ROWS,
            chunk=CHUNK,
            programs=_programs(q.device),
            sliding_window=sliding_window,
            skip_decodes=skip_decodes,
        )
    return work


def _layout(kv_cache: Tensor, q: Tensor, out: Tensor) -> Layout:
    """By TMA if a tile is a box of whole rows of a matrix [rows, D] that holds the cache."""
    values, scales = values_and_scales(kv_cache)
    strides = values.stride()[:3]
    scale_strides = (0, 0, 0) if scales is None else scales.stride()[:3]
    page_size, head_dim = values.shape[3:]
    if values.stride()[3:] != (head_dim, 1):
        raise ValueError(f"pages of the cache must be contiguous, not of strides {values.stride()}")
    tile = tile_tokens(head_dim, scales is not None)
    extents = zip(values.shape[:3], strides, strict=True)
    rows = sum((size - 1) * stride // head_dim for size, stride in extents) + page_size
    outer = (*q.stride()[:2], *out.stride()[:2])
    if (
        page_size % tile
        or head_dim != next_power_of_2(head_dim)
        or head_dim * values.element_size() % 16
        or values.data_ptr() % 16
        or any(stride % head_dim for stride in strides)
        or rows >= 2**31
        or _arch(q.device) < 90
    ):
        unit = 1 if any(stride % UNIT for stride in (*strides, *outer)) else UNIT
        in_units = tuple(stride // unit for stride in strides)
        return Layout(values, None, scales, in_units, scale_strides, unit)
    unit = 1 if any(stride % UNIT for stride in outer) else UNIT
    boxes = TensorDescriptor(values, [rows, head_dim], [head_dim, 1], [tile, head_dim])
    in_rows = tuple(stride // head_dim for stride in strides)
    return Layout(values, boxes, scales, in_rows, scale_strides, unit)


@functools.cache
def _arch(device: torch.device) -> int:
    """90 for sm_90; interpreted as that."""
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _programs(device: torch.device) -> int:
    """Two on each SM: one computes while the other waits."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


MODELS = {"smollm2-135m": (9, 3, 64), "llama-3.1-8b": (32, 8, 128), "qwen3-0.6b": (16, 8, 128)}
"""H, K and D of what is shipped; Qwen3-8B is as Llama 3.1 8B."""


def builds(arch: str) -> Iterator[Build]:
    """See builds.py."""
    for model, (num_heads, kv_heads, head_dim) in MODELS.items():
        heads = (num_heads, kv_heads, head_dim)
        for kv in ("bf16", "i8", "fp8e4nv"):
            if kv != "fp8e4nv" or arch != "sm_80":
                yield _attention_build(f"{model} {kv}", arch, heads, kv)
        yield Build(
            name=f"{model} fold",
            kernel=fold_kernel,
            types={
                **dict.fromkeys(("counts", "folds"), "*i32"),
                "out": "*bf16",
                **dict.fromkeys(("partial", "partial_stats"), "*fp32"),
                "num_tokens": "i32",
                **dict.fromkeys(("out_stride", "out_head_stride"), "i64"),
            },  # fmt: skip
            constants=fold_constants(*heads, Layout(None, None, None, (), (), UNIT)),
        )
        for skip_decodes, name in ((False, "work list"), (True, "work list, no decodes")):
            yield Build(
                name=f"{model} {name}",
                kernel=list_work_kernel,
                types={
                    **dict.fromkeys(
                        ("query_start_loc", "seq_lens", "counts", "items", "folds"), "*i32"
                    ),
                    **dict.fromkeys(("num_requests", "partial_rows", "window"), "i32"),
                },
                constants=work_constants(num_heads // kv_heads, ROWS, CHUNK, skip_decodes),
            )
    if arch != "sm_100":  # It spills 216 bytes there.
        yield _attention_build(
            "gemma-2-2b bf16", arch, (8, 4, 256), "bf16", WINDOWED=True, CAPPED=True
        )
    yield _attention_build("pages of 16, bf16", arch, (32, 8, 128), "bf16", page_size=16)


def _attention_build(
    name: str,
    arch: str,
    heads: tuple[int, int, int],
    kv: str,
    page_size: int = 64,
    **options: bool,
) -> Build:
    tma = int(arch.removeprefix("sm_")) >= 90 and page_size >= PAGE_TILE
    scales = None if kv == "bf16" else "scales"
    tile = tile_tokens(heads[2], scales is not None)
    layout = Layout(None, "boxes" if tma else None, scales, (), (), UNIT)
    instructions = {
        "sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor") if tma else ("wgmma.mma_async",),
        "sm_100": ("cp.async.bulk.tensor",) if tma else (),
    }
    return Build(
        name=name,
        kernel=attention_kernel,
        types={
            **dict.fromkeys(("counts", "items", "block_table"), "*i32"),
            **dict.fromkeys(("q", "out"), "*bf16"),
            "boxes": f"tensordesc<{kv}[{tile},{heads[2]}]>" if tma else f"*{kv}",
            "cache": f"*{kv}",
            "scales": "*bf16" if scales is None else "*fp32",
            **dict.fromkeys(("partial", "partial_stats", "totals", "total_stats"), "*fp32"),
            **dict.fromkeys(
                (name for name in attention_kernel.arg_names if "stride" in name), "i64"
            ),
            "window": "i32",
            **dict.fromkeys(("score_scale", "cap_scale", "cap"), "fp32"),
        },
        constants=constants(*heads, page_size, layout)
        | {"WINDOWED": False, "CAPPED": False}
        | options,
        num_warps=num_warps(heads[2], int(arch.removeprefix("sm_")), layout),
        num_stages=NUM_STAGES,
        expects=instructions.get(arch, ("mma.sync", "cp.async")),
    )
