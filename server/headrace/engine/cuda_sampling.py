"""From hidden states to tokens on a GPU, without the host waiting, and the results' way back.

Sampled tokens go to the device's last tokens, for the next step, and to pinned memory, for the
host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.engine.batch import ScheduledBatch, StepResult
from headrace.engine.client import TokenLogprobs
from headrace.engine.cuda_device import CudaDevice, Event
from headrace.engine.model_runner import LOGITS_CHUNK, PromptSpan, prompt_rows, prompt_spans
from headrace.engine.request import IntArray, LongArray, RunningRequests
from headrace.engine.sampler import NO_TOKEN, adjusted
from headrace.engine.sampling_batch import sampling_columns
from headrace.engine.step_inputs import DeviceRows, StepInputs
from headrace.models.base import CausalLM
from headrace_kernels.ops import sampling as ops


@dataclass(slots=True)
class _Logprobs:
    """Log-probabilities on their way to the host: pinned, of N positions."""

    own: Tensor
    """[N] float32"""
    top_ids: Tensor
    """[N * k] int64"""
    top: Tensor
    """[N * k] float32"""

    def entries(self, num_top: IntArray | int) -> list[TokenLogprobs]:
        """Of each position, so many of the most likely tokens as were asked for there."""
        count = len(self.own)
        shape = (count, len(self.top) // count)
        top_ids, top = (part.view(shape).tolist() for part in (self.top_ids, self.top))
        wanted = np.broadcast_to(num_top, count).tolist()
        columns = zip(self.own.tolist(), top_ids, top, wanted, strict=True)
        return [TokenLogprobs(own, ids[:k], values[:k]) for own, ids, values, k in columns]


@dataclass(slots=True)
class _SampledChunk:
    """Rows of a chunk that want log-probabilities."""

    indices: LongArray
    """Among the sampling rows."""
    num_top: IntArray
    logprobs: _Logprobs


@dataclass(slots=True)
class SamplingStep:
    """A PendingStep: its arrays are pinned, and filled once the event is done."""

    rows: LongArray
    """[S] that sample."""
    tokens: Tensor
    """[S] int64"""
    done: Event
    prompts: dict[int, list[tuple[PromptSpan, _Logprobs]]]
    chunks: list[_SampledChunk] = field(default_factory=list)
    _result: StepResult | None = None

    def result(self) -> StepResult:
        """Called once by the engine; before that by a step that needs the pinned memory."""
        if self._result is None:
            self.done.wait()
            self._result = self._read()
        return self._result

    def _read(self) -> StepResult:
        token_ids = self.tokens.numpy().copy()
        logprobs: dict[int, TokenLogprobs] = {}
        for chunk in self.chunks:
            entries = chunk.logprobs.entries(chunk.num_top)
            for index, entry in zip(chunk.indices.tolist(), entries, strict=True):
                if token_ids[index] != NO_TOKEN:
                    logprobs[int(self.rows[index])] = entry
        prompt_logprobs = {
            row: [entry for span, found in spans for entry in found.entries(span.num_top)]
            for row, spans in self.prompts.items()
        }
        return StepResult(token_ids, logprobs, prompt_logprobs)


class DeviceSampler:
    """Samples for all rows of a step that reached their end, a chunk of logits at a time."""

    def __init__(
        self, model: CausalLM, running: RunningRequests, rows: DeviceRows, device: CudaDevice
    ) -> None:
        self._model = model
        self._kernels = model.context.kernels
        self._running = running
        self._rows = rows
        self._device = device
        capacity = running.capacity

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(capacity, dtype=dtype, device=device.torch_device)

        self._logit_indices = column(torch.int64)
        self._columns = {
            "temperature": column(torch.float32),
            "top_k": column(torch.int32),
            "top_p": column(torch.float32),
            "min_p": column(torch.float32),
            "seeds": column(torch.int64),
            "positions": column(torch.int64),
        }
        # A ring: the tokens of the step in flight are read after the next step was launched.
        self._buffers = [(device.pinned(capacity, torch.int64), device.event()) for _ in range(2)]
        self._owners: list[SamplingStep | None] = [None, None]
        self._turn = 0

    def logprob_indices(self, batch: ScheduledBatch) -> LongArray:
        """[L] of the sampling rows, those whose log-probabilities are wanted."""
        return np.flatnonzero(self._running.num_logprobs[batch.rows[batch.samples]] >= 0)

    def launch(
        self, batch: ScheduledBatch, hidden: Tensor, inputs: StepInputs, wanted: LongArray
    ) -> SamplingStep:
        """Enqueue it all. hidden: [T', E]; `wanted` are the `logprob_indices` of the batch."""
        rows = batch.rows[batch.samples]
        step = self._new_step(rows)
        if count := len(rows):
            self._kernels.sampling_inputs(
                inputs.sampling_rows,
                inputs.query_start_loc,
                inputs.seq_lens,
                self._rows.sampling_words,
                self._logit_indices[:count],
                **{name: column[:count] for name, column in self._columns.items()},
            )
        for begin in range(0, count, LOGITS_CHUNK):
            chunk = slice(begin, min(begin + LOGITS_CHUNK, count))
            self._sample_chunk(chunk, batch, hidden, inputs, wanted, step)
        for row in prompt_rows(batch, self._running):
            step.prompts[row] = []
        for span in prompt_spans(batch, self._running):
            own_hidden = hidden[span.begin : span.begin + len(span.targets)]
            found = self._logprobs(
                self._model.compute_logits(own_hidden), self._upload(span.targets), span.num_top
            )
            step.prompts[span.row].append((span, found))
        step.done.record()
        return step

    def _new_step(self, rows: LongArray) -> SamplingStep:
        turn = self._turn
        if (owner := self._owners[turn]) is not None:
            owner.result()  # takes it out of the memory that is used again
        buffer, event = self._buffers[turn]
        step = SamplingStep(rows=rows, tokens=buffer[: len(rows)], done=event, prompts={})
        self._owners[turn] = step
        self._turn = (turn + 1) % len(self._buffers)
        return step

    def _sample_chunk(
        self,
        chunk: slice,
        batch: ScheduledBatch,
        hidden: Tensor,
        inputs: StepInputs,
        wanted: LongArray,
        step: SamplingStep,
    ) -> None:
        own_hidden = hidden.index_select(0, self._logit_indices[chunk])
        logits = self._model.compute_logits(own_hidden, reuse=True)
        tokens = ops.sample_tokens(
            self._adjusted(logits, chunk, batch),
            **{name: column[chunk] for name, column in self._columns.items()},
            kernels=self._kernels,
        )
        self._kernels.put(inputs.sampling_rows[chunk], tokens, self._rows.last_tokens)
        self._device.copy(tokens, step.tokens[chunk])
        first, end = np.searchsorted(wanted, (chunk.start, chunk.stop)).tolist()
        if first == end:
            return
        indices = inputs.logprob_indices[first:end]
        num_top = self._running.num_logprobs[step.rows[wanted[first:end]]]
        # A row without a token has no log-probabilities, and none are read.
        own_tokens = tokens.index_select(0, indices).clamp_(min=0)
        found = self._logprobs(logits.index_select(0, indices), own_tokens, int(num_top.max()))
        step.chunks.append(_SampledChunk(wanted[first:end], num_top, found))

    def _adjusted(self, logits: Tensor, chunk: slice, batch: ScheduledBatch) -> Tensor:
        running = self._running
        if not running.adjusts_logits:
            return logits
        rows, positions = batch.rows[batch.samples][chunk], batch.ends[batch.samples][chunk]
        return adjusted(logits, sampling_columns(running, rows, positions), self._upload)

    def _logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> _Logprobs:
        found = ops.token_logprobs(logits, token_ids, num_top, self._kernels)
        return _Logprobs(*self._downloads(*found))

    def _downloads(self, *tensors: Tensor) -> Iterator[Tensor]:
        for tensor in tensors:
            host = self._device.pinned(tensor.numel(), tensor.dtype)
            if tensor.numel():
                self._device.copy(tensor.reshape(-1), host)
            yield host

    def _upload(self, array: np.ndarray) -> Tensor:
        source = torch.from_numpy(np.ascontiguousarray(array))
        host = self._device.pinned(source.numel(), source.dtype)
        host.copy_(source)
        target = torch.empty_like(source, device=self._device.torch_device)
        self._device.copy(host, target)
        return target
