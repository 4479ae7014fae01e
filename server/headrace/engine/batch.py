"""What one step computes, as data: the seam between the scheduler and the model runner.

numpy only; the runner turns it into tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.engine.client import TokenLogprobs
from headrace.engine.request import IntArray, LongArray, RunningRequests

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work. R rows; row `rows[i]` computes `num_scheduled[i]` tokens from `starts[i]`.

    The counts of RunningRequests are those after the step: they move on when it is scheduled.
    """

    rows: LongArray
    """[R] rows of RunningRequests, ascending."""
    generations: LongArray
    """[R] what tells the request that holds the row now from those before and after it."""
    starts: IntArray
    """[R] tokens in the cache before this step."""
    num_scheduled: IntArray
    """[R] tokens each row computes in this step, at least 1."""
    samples: np.ndarray
    """[R] bool: the row reaches its last known token, so that a next one is sampled."""
    num_tokens: int
    """T = sum(num_scheduled)."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ends(self) -> IntArray:
        """[R] tokens in the cache after this step: where a row that samples puts its token."""
        return self.starts + self.num_scheduled

    def kept(self, mask: np.ndarray) -> ScheduledBatch:
        """The rows where `mask` [R] is set."""
        num_scheduled = self.num_scheduled[mask]
        return ScheduledBatch(
            rows=self.rows[mask],
            generations=self.generations[mask],
            starts=self.starts[mask],
            num_scheduled=num_scheduled,
            samples=self.samples[mask],
            num_tokens=int(num_scheduled.sum()),
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner found for a ScheduledBatch."""

    token_ids: LongArray
    """[number of sampling rows] in batch order; -1 where the logits were not numbers."""
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """By row of RunningRequests, for rows that asked."""
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By row: one entry per token that the chunk predicted inside the prompt."""
    vectors: Mapping[int, FloatArray] = field(default_factory=dict)
    """By row, for pooled rows that reached the end of their prompts: [E]."""
    oom_retries: int = 0
    """How often the device was out of memory, so that a part of the step was computed in two."""


NO_WORK = ScheduledBatch(
    rows=np.empty(0, np.int64),
    generations=np.empty(0, np.int64),
    starts=np.empty(0, np.int32),
    num_scheduled=np.empty(0, np.int32),
    samples=np.empty(0, np.bool_),
    num_tokens=0,
)
NO_RESULT = StepResult(token_ids=np.empty(0, np.int64))


class PendingStep(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Wait until the step is done. Called once. RunningRequests have moved on meanwhile: a
        row may be free, or another request's."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A PendingStep whose result is known."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


@dataclass(frozen=True, slots=True)
class ModelInput:
    """The flat, ragged batch on the host. T tokens, padded by `pad_to` to T' tokens.

    Padding tokens have token id 0, position 0 and slot -1; they belong to no request.
    """

    token_ids: LongArray
    """[T']"""
    positions: LongArray
    """[T']"""
    slot_mapping: LongArray
    """[T'] block * block_size + offset of the KV entry to write, -1 for padding."""
    query_lens: IntArray
    """[R]"""
    seq_lens: IntArray
    """[R] tokens in the cache once this step's are written."""
    block_table: IntArray
    """[R, max blocks of any row]"""
    logit_indices: LongArray
    """[number of sampling rows] index into T of each sampling row's last token."""


def build_model_input(
    batch: ScheduledBatch, running: RunningRequests, *, block_size: int, pad_to: int
) -> ModelInput:
    """Lay the batch out flat: row after row, each with its scheduled tokens in order.

    A token that the step in flight samples is UNKNOWN_TOKEN: the device must put it in.
    """
    rows, query_lens, start = batch.rows, batch.num_scheduled, batch.starts
    ends = np.cumsum(query_lens)
    row_of_token = np.repeat(rows, query_lens)
    offset = np.arange(batch.num_tokens) - np.repeat(ends - query_lens, query_lens)
    positions = np.repeat(start, query_lens) + offset

    padded = -(-batch.num_tokens // pad_to) * pad_to
    token_ids = np.zeros(padded, np.int64)
    token_ids[: batch.num_tokens] = running.token_ids[row_of_token, positions]
    padded_positions = np.zeros(padded, np.int64)
    padded_positions[: batch.num_tokens] = positions
    slots = np.full(padded, -1, np.int64)
    blocks = running.block_table[row_of_token, positions // block_size].astype(np.int64)
    slots[: batch.num_tokens] = blocks * block_size + positions % block_size
    return ModelInput(
        token_ids=token_ids,
        positions=padded_positions,
        slot_mapping=slots,
        query_lens=query_lens,
        seq_lens=start + query_lens,
        block_table=running.block_table[rows, : int(running.num_blocks[rows].max())],
        logit_indices=(ends - 1)[batch.samples],
    )
