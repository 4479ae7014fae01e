"""Runs steps on a CPU: each is computed when it is launched. Owns weights and KV tensors."""

from __future__ import annotations

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
from headrace.engine.model_runner import LOGITS_CHUNK, kv_layers, prompt_rows, prompt_spans
from headrace.engine.pooling import Pooler
from headrace.engine.recorded_steps import RecordedSteps
from headrace.engine.request import RunningRequests
from headrace.engine.sampler import Sampler
from headrace.engine.sampling_batch import sampling_columns
from headrace.models.base import CausalLM
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.ops.sampling import token_logprobs


class CpuRunner:
    """Runs ScheduledBatches. Not thread-safe; one step at a time."""

    overlaps = False

    def __init__(
        self,
        model: CausalLM,
        running: RunningRequests,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        pad_to: int,
    ) -> None:
        """`pad_to`: T is made a multiple of this; 1 records decode steps too."""
        self._model = model
        self._running = running
        self._block_size = block_size
        self._pad_to = pad_to
        self._sampler = Sampler(model.context.kernels)
        self._pooler = Pooler(running)
        self._kv_layers = kv_layers(
            model.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=kv_dtype,
            device=torch.device("cpu"),
        )
        self._recorded: RecordedSteps | None = None
        if pad_to == 1:
            self._recorded = RecordedSteps(model, running, self._kv_layers, block_size)

    def launch(self, batch: ScheduledBatch) -> FinishedStep:
        """Computes the whole step: on a CPU nothing is gained by returning before it is done."""
        return FinishedStep(self._execute(batch))

    def idle(self) -> bool:
        return False

    @torch.inference_mode()
    def _execute(self, batch: ScheduledBatch) -> StepResult:
        """One forward pass over the batch and a token for each row that reached its end."""
        pools = bool(self._running.pooled)
        if self._recorded is not None and not pools and self._recorded.takes(batch):
            return self._sample(batch, [self._recorded.logits(batch)])
        model_input = build_model_input(
            batch, self._running, block_size=self._block_size, pad_to=self._pad_to
        )
        hidden = self._forward(model_input)
        result = self._sample(batch, self._logits(model_input, hidden))
        vectors = self._pooler.pool(self._pooler.spans(batch, hidden)) if pools else {}
        return replace(
            result, prompt_logprobs=self._prompt_logprobs(batch, hidden), vectors=vectors
        )

    def _logits(self, model_input: ModelInput, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of the rows that sample, a chunk at a time, each in the memory of the last."""
        logit_indices = model_input.logit_indices
        for start in range(0, len(logit_indices), LOGITS_CHUNK):
            indices = torch.from_numpy(logit_indices[start : start + LOGITS_CHUNK])
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
            tokens = self._sampler.sample(logits, columns, reuse=True)
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
            device="cpu",
        )
        hidden: torch.Tensor = self._model(
            torch.from_numpy(model_input.token_ids),
            torch.from_numpy(model_input.positions),
            self._kv_layers,
            metadata,
        )
        return hidden

    def _prompt_logprobs(
        self, batch: ScheduledBatch, hidden: torch.Tensor
    ) -> dict[int, list[TokenLogprobs]]:
        rows = prompt_rows(batch, self._running)
        found: dict[int, list[TokenLogprobs]] = {row: [] for row in rows}
        for span in prompt_spans(batch, self._running):
            own_hidden = hidden[span.begin : span.begin + len(span.targets)]
            own, top_ids, top = token_logprobs(
                self._model.compute_logits(own_hidden),
                torch.from_numpy(span.targets),
                span.num_top,
                self._model.context.kernels,
            )
            found[span.row].extend(
                TokenLogprobs(*entry)
                for entry in zip(own.tolist(), top_ids.tolist(), top.tolist(), strict=True)
            )
        return found
