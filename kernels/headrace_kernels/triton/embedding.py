"""Rows of a table as fp32: 6 bytes a value of bf16 (E = 4096, 2k tokens: 50 MB, 12 us at 4.3 TB/s).

A row is batch invariant: it is copied. An id outside of the table reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.triton.builds import Build
from headrace_kernels.triton.quantization import check_layout

BLOCK = 1024
WARPS = 4


def declines(facts: KernelFacts) -> str | None:
    return None


@triton.jit(do_not_specialize=["vocabulary"])
def embedding_kernel(
    ids_ptr,
    weight_ptr,
    out_ptr,
    vocabulary,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row)
    known = (column < WIDTH) & (token >= 0) & (token < vocabulary)
    values = tl.load(weight_ptr + token * STRIDE + column, known, other=float("nan"))
    tl.store(out_ptr + row * WIDTH + column, values.to(tl.float32), column < WIDTH)


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops/embedding.py."""
    if not out.numel():
        return
    check_layout(token_ids=token_ids, out=out)
    check_layout(adjacent=True, weight=weight)
    width = weight.shape[1]
    embedding_kernel[len(token_ids), triton.cdiv(width, BLOCK)](
        token_ids,
        weight,
        out,
        len(weight),
        STRIDE=weight.stride(0),
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


def builds(arch: str) -> Iterator[Build]:
    """SmolLM2-135M, Qwen3-0.6B, and 4096 of Llama-3.1-8B and Qwen3-8B."""
    for width in (576, 1024, 4096):
        yield Build(
            name=f"{width} of bf16",
            kernel=embedding_kernel,
            types={
                "ids_ptr": "*i64",
                "weight_ptr": "*bf16",
                "out_ptr": "*fp32",
                "vocabulary": "i32",
            },
            constants={"STRIDE": width, "WIDTH": width, "BLOCK": BLOCK},
            num_warps=WARPS,
        )
