"""QK-norm, rotary embedding and the cache write by the C++ kernel, or by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS, log_once
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import rope as reference

_rope_and_write_kv = torch.ops.headrace.rope_and_write_kv.default


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


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
    arguments = (
        qkv, positions, cos_sin, kv_cache, slot_mapping, q_out, q_norm, k_norm, eps
    )  # fmt: skip
    try:
        _rope_and_write_kv(*arguments)
    except RuntimeError as refusal:
        log_once("rope_and_write_kv", str(refusal))
        reference.rope_and_write_kv(*arguments)
