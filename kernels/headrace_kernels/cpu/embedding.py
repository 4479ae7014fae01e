"""Embedding by the C++ kernel: fp32 and bfloat16; the rest goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import FLOATS
from headrace_kernels.dispatch import KernelFacts

_embedding = torch.ops.headrace.embedding.default


def declines(facts: KernelFacts) -> str | None:
    return None if facts.dtype in FLOATS else f"takes float32 and bfloat16, not {facts.dtype}"


def embedding(token_ids: Tensor, weight: Tensor, out: Tensor) -> None:
    """See ops/embedding.py."""
    _embedding(token_ids, weight, out)
