"""What the runners of all devices share: the KV tensors, and which logits a step is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.engine.batch import ScheduledBatch
from headrace.engine.request import LongArray, RunningRequests
from headrace.models.config import ModelConfig
from headrace_kernels.cpu import pages
from headrace_kernels.kv_format import row_size

LOGITS_CHUNK = 256
"""Rows of logits made at a time: [256, V] fp32 is 50 MB at V = 49k, 155 MB at V = 152k."""


def kv_layers(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Uninitialized caches [B, 2, K, P, row size] of each layer: views of one tensor.

    All layers of a block are contiguous: one copy swaps or sends a block. On a CPU memory is
    committed only as blocks are first written.
    """
    page = (2, config.num_kv_heads, block_size, row_size(config.head_dim, dtype))
    shape = (num_blocks, config.num_layers, *page)
    if device.type == "cpu":
        cache = pages.empty(*shape, dtype=dtype)
    else:
        cache = torch.empty(shape, dtype=dtype, device=device)
    return [cache[:, layer] for layer in range(config.num_layers)]


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Neighbouring tokens of a prompt whose log-probabilities a step can tell."""

    row: int
    begin: int
    """Among the step's tokens: the one whose logits predict the first target."""
    targets: LongArray
    """[N <= LOGITS_CHUNK] the tokens that stand there."""
    num_top: int
    """Most likely tokens that are wanted beside them."""


def prompt_rows(batch: ScheduledBatch, running: RunningRequests) -> dict[int, int]:
    """Row -> its index in the batch, for the rows that want log-probabilities of their prompt."""
    if not running.with_prompt_logprobs:
        return {}
    rows = enumerate(batch.rows.tolist())
    return {row: index for index, row in rows if row in running.with_prompt_logprobs}


def prompt_spans(batch: ScheduledBatch, running: RunningRequests) -> Iterator[PromptSpan]:
    """What this step predicts inside the prompts of `prompt_rows`; of some it may be nothing."""
    begins = np.cumsum(batch.num_scheduled) - batch.num_scheduled
    for row, index in prompt_rows(batch, running).items():
        first = int(batch.starts[index]) + 1
        end = min(first + int(batch.num_scheduled[index]), int(running.num_prompt_tokens[row]))
        for start in range(first, end, LOGITS_CHUNK):
            stop = min(start + LOGITS_CHUNK, end)
            yield PromptSpan(
                row=row,
                begin=int(begins[index]) + start - first,
                targets=running.token_ids[row, start:stop].astype(np.int64),
                num_top=running.request(row).sampling.prompt_logprobs or 0,
            )
