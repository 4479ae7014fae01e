"""Owns the device: weights, KV tensors, one forward pass and sampling per ScheduledBatch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from headrace.engine.batch import (
    FinishedStep,
    ModelInput,
    ScheduledBatch,
    StepResult,
    build_model_input,
)
from headrace.engine.client import TokenLogprobs
from headrace.engine.recorded_steps import RecordedSteps
from headrace.engine.request import RunningRequests
from headrace.engine.sampler import Sampler
from headrace.engine.sampling_batch import sampling_columns
from headrace.models.base import CausalLM
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.cpu import pages
from headrace_kernels.kv_format import row_size
from headrace_kernels.ops.sampling import token_logprobs

logger = logging.getLogger(__name__)

LOGITS_CHUNK = 256
"""Rows of logits made at a time: [256, V] fp32 is 50 MB at V = 49k, 155 MB at V = 152k."""


class ModelRunner:
    """Runs ScheduledBatches on one device. Not thread-safe; one step at a time."""

    overlaps = False

    def __init__(
        self,
        model: CausalLM,
        running: RunningRequests,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        kv_dtype: torch.dtype,
        pad_to: int,
    ) -> None:
        """`pad_to`: T is made a multiple of this; 1 records decode steps too."""
        self._model = model
        self._running = running
        self._block_size = block_size
        self._device = device
        self._pad_to = pad_to
        self._sampler = Sampler(model.context.kernels)
        config = model.config
        # All layers of a block are contiguous: one copy swaps or sends a block. `empty` commits
        # memory only as blocks are first written.
        page = (2, config.num_kv_heads, block_size, row_size(config.head_dim, kv_dtype))
        shape = (num_blocks, config.num_layers, *page)
        if device.type == "cpu":
            self._kv_cache = pages.empty(*shape, dtype=kv_dtype)
        else:
            self._kv_cache = torch.empty(shape, dtype=kv_dtype, device=device)
        self._kv_layers = [self._kv_cache[:, layer] for layer in range(config.num_layers)]
        self._recorded: RecordedSteps | None = None
        if device.type == "cpu" and pad_to == 1:
            self._recorded = RecordedSteps(model, running, self._kv_layers, block_size)

    def launch(self, batch: ScheduledBatch) -> FinishedStep:
        """Computes the whole step: on a CPU nothing is gained by returning before it is done."""
        return FinishedStep(self._execute(batch))

    @torch.inference_mode()
    def _execute(self, batch: ScheduledBatch) -> StepResult:
        """One forward pass over the batch and a token for each row that reached its end."""
        if self._recorded is not None and self._recorded.takes(batch):
            return self._sample(batch, [self._recorded.logits(batch)])
        model_input = build_model_input(
            batch, self._running, block_size=self._block_size, pad_to=self._pad_to
        )
        hidden = self._forward(model_input)
        result = self._sample(batch, self._logits(model_input, hidden))
        return replace(result, prompt_logprobs=dict(self._prompt_logprobs(batch, hidden)))

    def _logits(self, model_input: ModelInput, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of the rows that sample, a chunk at a time, each in the memory of the last."""
        logit_indices = model_input.logit_indices
        for start in range(0, len(logit_indices), LOGITS_CHUNK):
            indices = self._to_device(logit_indices[start : start + LOGITS_CHUNK])
            yield self._model.compute_logits(hidden[indices], reuse=True)

    def _sample(self, batch: ScheduledBatch, chunks: Iterable[torch.Tensor]) -> StepResult:
        sampled: list[np.ndarray] = []
        logprobs: dict[int, TokenLogprobs] = {}
        all_rows, all_positions = batch.rows[batch.samples], batch.ends[batch.samples]
        end = 0
        for logits in chunks:
            start, end = end, end + len(logits)
            rows = all_rows[start:end]
            columns = sampling_columns(self._running, rows, all_positions[start:end])
            tokens = self._sampler.sample(logits, columns)
            sampled.append(tokens.token_ids)
            for index, (own, top_ids, top) in tokens.logprobs.items():
                logprobs[int(rows[index])] = TokenLogprobs(own, top_ids, top)
        token_ids = np.concatenate(sampled) if sampled else np.empty(0, np.int64)
        return StepResult(token_ids, logprobs)

    def _forward(self, model_input: ModelInput) -> torch.Tensor:
        metadata = AttentionMetadata.build(
            query_lens=model_input.query_lens,
            seq_lens=model_input.seq_lens,
            block_table=model_input.block_table,
            slot_mapping=model_input.slot_mapping,
            device=self._device,
        )
        hidden: torch.Tensor = self._model(
            self._to_device(model_input.token_ids),
            self._to_device(model_input.positions),
            self._kv_layers,
            metadata,
        )
        return hidden

    def _prompt_logprobs(
        self, batch: ScheduledBatch, hidden: torch.Tensor
    ) -> Iterator[tuple[int, list[TokenLogprobs]]]:
        """For each row that wants them: the tokens of its prompt that this chunk predicts."""
        running = self._running
        if not running.with_prompt_logprobs:
            return
        ends = np.cumsum(batch.num_scheduled)
        for index, row in enumerate(batch.rows.tolist()):
            if row not in running.with_prompt_logprobs:
                continue
            first = int(batch.starts[index]) + 1
            end = min(first + int(batch.num_scheduled[index]), int(running.num_prompt_tokens[row]))
            offset = int(ends[index] - batch.num_scheduled[index])
            count = running.request(row).sampling.prompt_logprobs or 0
            entries: list[TokenLogprobs] = []
            for start in range(first, end, LOGITS_CHUNK):
                stop = min(start + LOGITS_CHUNK, end)
                begin = offset + start - first
                logits = self._model.compute_logits(hidden[begin : begin + stop - start])
                targets = self._to_device(running.token_ids[row, start:stop].astype(np.int64))
                own, top_ids, top = token_logprobs(
                    logits, targets, count, self._model.context.kernels
                )
                entries.extend(
                    TokenLogprobs(*entry)
                    for entry in zip(own.tolist(), top_ids.tolist(), top.tolist(), strict=True)
                )
            yield row, entries

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
