"""Runs steps on a GPU: launches them, without waiting, as CUDA graphs or op by op.

Owns KV tensors, graphs and the device's state. A step of up to MAX_GRAPH_TOKENS replays the graph
of its number of tokens. Its inputs are made, and its tokens sampled, outside of the graph; what
samples is copied out of the graph's memory before anything else can be replayed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from headrace.engine.batch import (
    NO_WORK,
    PendingStep,
    ScheduledBatch,
    StepResult,
)
from headrace.engine.cuda_device import CudaDevice
from headrace.engine.cuda_graph import POOL_SPARE_BLOCKS, GraphBook, graph_sizes
from headrace.engine.cuda_sampling import DeviceSampler
from headrace.engine.model_runner import LOGITS_CHUNK, kv_layers
from headrace.engine.pooling import PooledSpan, Pooler
from headrace.engine.request import RunningRequests
from headrace.engine.step_inputs import StepInputMaker, StepInputs
from headrace.models.base import CausalLM
from headrace_kernels.attention_metadata import AttentionMetadata

logger = logging.getLogger(__name__)

NO_INDICES = np.empty(0, np.int64)


class CudaRunner:
    """Runs ScheduledBatches. Not thread-safe; steps run in the order of their launches."""

    overlaps = True

    def __init__(
        self,
        model: CausalLM,
        running: RunningRequests,
        device: CudaDevice,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        pad_to: int,
        max_num_batched_tokens: int,
        graphs: bool = True,
    ) -> None:
        """`pad_to`: T is made a multiple of this. `graphs`: every kernel can be captured."""
        self._model = model
        self._running = running
        self._device = device
        self._pad_to = pad_to
        max_tokens = -(-max_num_batched_tokens // pad_to) * pad_to
        self.graphs = GraphBook(graph_sizes(max_tokens, pad_to) if graphs else ())
        self._hidden: dict[int, Tensor] = {}
        self._pooler = Pooler(running)
        with device.stream():
            self._inputs = StepInputMaker(
                running,
                model.context.kernels,
                device,
                block_size=block_size,
                max_tokens=max(max_tokens, *self.graphs.sizes, 0),
            )
            self._sampler = DeviceSampler(model, running, self._inputs.rows, device)
            self._kv_layers = kv_layers(
                model.config,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=kv_dtype,
                device=device.torch_device,
            )

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> PendingStep:
        """Enqueue a step. If the device is out of memory its halves are enqueued instead."""
        with self._device.stream():
            if (size := self.graphs.due()) is not None:
                self._try_capture(size)
            return self._launch(batch)

    @torch.inference_mode()
    def idle(self) -> bool:
        """Capture one graph that is missing; False if there is none. Not while steps are awaited:
        it takes some milliseconds."""
        size = self.graphs.next()
        if size is None:
            return False
        with self._device.stream():
            return self._try_capture(size)

    def _launch(self, batch: ScheduledBatch) -> PendingStep:
        try:
            return self._enqueue(batch)
        except torch.OutOfMemoryError:
            if batch.num_tokens == 1:
                raise
        # Not inside of the handler: the traceback would keep the memory of what failed.
        logger.warning(
            "Out of GPU memory in a step of %d tokens: it is computed in two. If that happens "
            "often, lower --max-num-batched-tokens or --kv-cache-memory-bytes.",
            batch.num_tokens,
        )
        return _Halves(*(self._launch(half) for half in halves(batch)))

    def _enqueue(self, batch: ScheduledBatch) -> PendingStep:
        size = self.graphs.take(batch.num_tokens)
        padded = size or -(-batch.num_tokens // self._pad_to) * self._pad_to
        wanted = self._sampler.logprob_indices(batch)
        inputs = self._inputs.make(batch, padded, wanted % LOGITS_CHUNK)
        if size is None:
            hidden = self._forward(inputs, batch)
        else:
            self.graphs[size].replay()
            hidden = self._hidden[size]
        if not self._running.pooled:
            return self._sampler.launch(batch, hidden, inputs, wanted)
        spans = [self._on_host(span) for span in self._pooler.spans(batch, hidden)]
        return _Pooled(self._sampler.launch(batch, hidden, inputs, wanted), self._pooler, spans)

    def _on_host(self, span: PooledSpan) -> PooledSpan:
        """With hidden states that are there once the step's result is."""
        host = self._device.pinned(span.hidden.numel(), span.hidden.dtype)
        if span.hidden.numel():
            self._device.copy(span.hidden.reshape(-1), host)
        return span._replace(hidden=host.view(span.hidden.shape))

    def _forward(self, inputs: StepInputs, batch: ScheduledBatch | None) -> Tensor:
        """[T', E]: enqueue a forward pass, op by op. Without `batch` the host does not know what
        will be computed: a graph is replayed with any."""
        capacity = self._running.capacity if batch is not None else 0
        query_lens, kv_lens = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32)
        block_table = self._running.block_table[:capacity]
        if batch is not None:
            query_lens[batch.rows], kv_lens[batch.rows] = batch.num_scheduled, batch.ends
        metadata = AttentionMetadata(
            query_start_loc=inputs.query_start_loc,
            seq_lens=inputs.seq_lens,
            block_table=self._inputs.rows.block_table,
            slot_mapping=inputs.slot_mapping,
            query_lens=query_lens,
            kv_lens=kv_lens,
            host_block_table=block_table,
        )
        hidden: Tensor = self._model(inputs.token_ids, inputs.positions, self._kv_layers, metadata)
        return hidden

    def _try_capture(self, size: int) -> bool:
        """Whether there may be another one to capture. Without graphs steps are slower: no more."""
        try:
            self._capture(size)
        except RuntimeError as error:  # out of memory, or what a kernel did cannot be captured
            logger.warning("No CUDA graph of %d tokens, and no more of others: %s", size, error)
            self.graphs.close()
            return False
        if self.graphs.is_closed:
            logger.warning(
                "The memory of CUDA graphs grew by %d bytes: no more are captured.",
                self.graphs.pool_growth,
            )
        return not self.graphs.is_closed

    def _capture(self, size: int) -> None:
        """Capture a step of `size` tokens, while none of the rows has any."""
        inputs = self._inputs.make(NO_WORK, size, NO_INDICES)
        # Loads the kernels, and makes the memory that all steps share: neither may happen later.
        hidden = self._forward(inputs, None)
        captured: list[Tensor] = []
        is_first = not self.graphs.captured

        def run() -> None:
            if is_first:
                self._reserve_spare_blocks()
            captured.append(self._forward(inputs, None))

        before = self._device.reserved_bytes()
        graph = self._device.capture(run)
        growth = self._device.reserved_bytes() - before
        # What is outside of the pool keeps its place, and no tensor of the pool is kept: its
        # memory is that of the next graph, too.
        assert captured[0].data_ptr() == hidden.data_ptr(), "hidden states lie in the pool"
        self._hidden[size] = hidden
        self.graphs.add(size, graph, growth)

    def _reserve_spare_blocks(self) -> None:
        """Allocated at once and freed at once, within the first capture: they stay in its pool."""
        device = self._device.torch_device
        blocks = [torch.empty(n, dtype=torch.uint8, device=device) for n in POOL_SPARE_BLOCKS]
        del blocks


@dataclass(frozen=True, slots=True)
class _Pooled:
    """A PendingStep of which some rows are pooled."""

    step: PendingStep
    pooler: Pooler
    spans: list[PooledSpan]

    def result(self) -> StepResult:
        result = self.step.result()
        return replace(result, vectors=self.pooler.pool(self.spans))


@dataclass(frozen=True, slots=True)
class _Halves:
    """A PendingStep that was launched in two, for want of memory."""

    first: PendingStep
    second: PendingStep

    def result(self) -> StepResult:
        first, second = self.first.result(), self.second.result()
        prompt_logprobs = dict(first.prompt_logprobs)
        for row, entries in second.prompt_logprobs.items():
            prompt_logprobs[row] = [*prompt_logprobs.get(row, ()), *entries]
        return StepResult(
            token_ids=np.concatenate((first.token_ids, second.token_ids)),
            logprobs={**first.logprobs, **second.logprobs},
            prompt_logprobs=prompt_logprobs,
            vectors={**first.vectors, **second.vectors},
            oom_retries=first.oom_retries + second.oom_retries + 1,
        )


def halves(batch: ScheduledBatch) -> tuple[ScheduledBatch, ScheduledBatch]:
    """The first half of the batch's tokens, and the others; one row may be in both."""
    assert batch.num_tokens > 1
    ends = np.cumsum(batch.num_scheduled)
    in_first = np.clip(batch.num_tokens // 2 - (ends - batch.num_scheduled), 0, batch.num_scheduled)
    in_second = batch.num_scheduled - in_first
    first = replace(batch, num_scheduled=in_first, samples=batch.samples & (in_second == 0))
    second = replace(batch, num_scheduled=in_second, starts=batch.starts + in_first)
    return first.kept(in_first > 0), second.kept(in_second > 0)
