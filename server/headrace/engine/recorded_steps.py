"""Decode steps on a CPU, recorded once for each number of requests and replayed in one native call.

Owns the memory that recordings read. Steps that are not recorded run op by op; the bits are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.engine.batch import ScheduledBatch
from headrace.engine.request import RunningRequests
from headrace.models.base import CausalLM
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.cpu.tape import NotRecordable, Tape, record

logger = logging.getLogger(__name__)

MAX_RECORDED_REQUESTS = 64
"""Of more, a step takes long enough to hide what its dispatch costs."""


class RecordedSteps:
    """One forward pass, with logits, for batches in which every request computes one token.

    The first step of each size runs op by op, and allocates what it needs; the second is recorded.
    """

    def __init__(
        self, model: CausalLM, running: RunningRequests, kv_layers: Sequence[Tensor], page_size: int
    ) -> None:
        self._model = model
        self._running = running
        self._kv_layers = kv_layers
        self._page_size = page_size
        self._seen: set[int] = set()
        self._recorded: dict[int, tuple[Tape, Tensor, AttentionMetadata]] = {}
        self._recordable = True
        capacity, max_blocks = running.block_table.shape
        rows = min(capacity, MAX_RECORDED_REQUESTS)
        self._max_requests = rows
        self._token_ids = np.zeros(rows, np.int64)
        self._positions = np.zeros(rows, np.int64)
        self._slots = np.zeros(rows, np.int64)
        self._seq_lens = np.zeros(rows, np.int32)
        self._block_table = np.zeros((rows, max_blocks), np.int32)

    def takes(self, batch: ScheduledBatch) -> bool:
        count = len(batch)
        return (
            self._recordable
            and batch.num_tokens == count <= self._max_requests
            and bool(batch.samples.all())
            and not self._running.with_prompt_logprobs
        )

    def logits(self, batch: ScheduledBatch) -> Tensor:
        """[R, V] float32, of a batch that it takes; the next call overwrites them."""
        count = len(batch)
        self._fill(batch)
        if recorded := self._recorded.get(count):
            tape, logits, _ = recorded
            tape.replay()
            return logits
        metadata = self._metadata(count)
        if count not in self._seen:
            self._seen.add(count)
            return self._forward(count, metadata)
        try:
            tape, logits = record(lambda: self._forward(count, metadata))
        except NotRecordable as reason:
            logger.info("Steps run op by op: %s cannot be recorded.", reason)
            self._recordable = False
            return self._forward(count, metadata)
        self._recorded[count] = tape, logits, metadata
        return logits

    def _fill(self, batch: ScheduledBatch) -> None:
        running, rows, count = self._running, batch.rows, len(batch)
        positions = batch.starts
        blocks = running.block_table[rows, positions // self._page_size].astype(np.int64)
        self._positions[:count] = positions
        self._token_ids[:count] = running.token_ids[rows, positions]
        self._slots[:count] = blocks * self._page_size + positions % self._page_size
        self._seq_lens[:count] = positions + 1
        width = running.num_blocks[rows].max()
        self._block_table[:count, :width] = running.block_table[rows, :width]

    def _metadata(self, count: int) -> AttentionMetadata:
        """Views of the memory that `_fill` writes."""
        query_lens = np.ones(count, np.int32)
        return AttentionMetadata(
            query_start_loc=torch.arange(count + 1, dtype=torch.int32),
            seq_lens=torch.from_numpy(self._seq_lens[:count]),
            block_table=torch.from_numpy(self._block_table[:count]),
            slot_mapping=torch.from_numpy(self._slots[:count]),
            query_lens=query_lens,
            kv_lens=self._seq_lens[:count],
            host_block_table=self._block_table[:count],
        )

    def _forward(self, count: int, metadata: AttentionMetadata) -> Tensor:
        token_ids = torch.from_numpy(self._token_ids[:count])
        positions = torch.from_numpy(self._positions[:count])
        hidden: Tensor = self._model(token_ids, positions, self._kv_layers, metadata)
        return self._model.compute_logits(hidden, reuse=True)
