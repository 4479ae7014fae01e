"""Sampling and log-probabilities by the C++ kernels; what they refuse goes to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.cpu.scratch import scratch
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import sampling as reference

_sample_tokens = torch.ops.headrace.sample_tokens.default
_token_logprobs = torch.ops.headrace.token_logprobs.default

CHUNK = 8192
"""Tokens of a row that are one piece of work."""
ROW_BYTES, CHUNK_BYTES = 128, 576
"""Scratch for a row, and for each of its chunks."""


def declines(facts: KernelFacts) -> str | None:
    """Logits are float32 whatever the model is."""
    return None


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """See ops/sampling.py."""
    columns = (temperature, top_k, top_p, min_p, seeds, positions)
    try:
        _sample_tokens(logits, *columns, _memory(logits), out)
    except RuntimeError as refusal:
        log_once("sample_tokens", str(refusal))
        reference.sample_tokens(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            out=out,
        )


def token_logprobs(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    """See ops/sampling.py."""
    try:
        _token_logprobs(logits, token_ids, _memory(logits), logprobs, top_ids, top_logprobs)
    except RuntimeError as refusal:
        log_once("token_logprobs", str(refusal))
        reference.token_logprobs(logits, token_ids, logprobs, top_ids, top_logprobs)


def _memory(logits: Tensor) -> Tensor:
    rows, vocab_size = logits.shape
    chunks = -(-vocab_size // CHUNK)
    return scratch("sampling", rows * (ROW_BYTES + chunks * CHUNK_BYTES))
