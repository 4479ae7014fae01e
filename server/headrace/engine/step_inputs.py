"""What the device knows of the running requests, and what each step sends to keep that true.

Block tables, sampling parameters and last tokens stay on the device, by row of RunningRequests. A
step sends its lengths and host tokens, and what moved on in the rows that it computes, in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.engine.batch import ScheduledBatch
from headrace.engine.cuda_device import CudaDevice
from headrace.engine.request import IntArray, LongArray, RunningRequests
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.ops.step_inputs import SAMPLING_WORDS

ALIGNMENT = 4
"""int32 words: kernels are compiled for arrays that begin at multiples of 16 bytes."""
NO_CHANGES = np.empty(0, np.int64), np.empty(0, np.int32)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class DeviceRows:
    """Row r of every tensor is row r of RunningRequests, as of the last step that computed it."""

    def __init__(self, running: RunningRequests, device: torch.device) -> None:
        rows, max_blocks = running.block_table.shape
        self._running = running
        self._words_at = _aligned(rows * max_blocks)
        last_at = self._words_at + _aligned(rows * SAMPLING_WORDS)
        assert last_at + rows < 1 << 31, "entries are numbered in 32 bits"
        self._entries = torch.zeros(last_at + rows, dtype=torch.int32, device=device)
        self.block_table = self._entries[: rows * max_blocks].view(rows, max_blocks)
        words = self._entries[self._words_at : self._words_at + rows * SAMPLING_WORDS]
        self.sampling_words = words.view(rows, SAMPLING_WORDS)
        self.last_tokens = self._entries[last_at:]
        self._generations: LongArray = np.full(rows, -1, np.int64)
        self._num_blocks: IntArray = np.zeros(rows, np.int32)

    @property
    def max_changes(self) -> int:
        return self.block_table.numel() + self.sampling_words.numel()

    def moved(self, rows: LongArray) -> LongArray:
        """Those of `rows` that hold another request, or more blocks, than `apply` was told of."""
        running = self._running
        is_same = (running.generations[rows] == self._generations[rows]) & (
            running.num_blocks[rows] == self._num_blocks[rows]
        )
        moved: LongArray = rows[~is_same]
        return moved

    def changes(self, moved: LongArray) -> tuple[LongArray, IntArray]:
        """(index of each entry that moved on in these rows, its value)"""
        if len(moved) == 0:
            return NO_CHANGES
        running = self._running
        is_new = running.generations[moved] != self._generations[moved]
        known = np.where(is_new, 0, self._num_blocks[moved])
        counts = running.num_blocks[moved] - known
        ends = np.cumsum(counts)
        row = np.repeat(moved, counts)
        column = np.arange(len(row)) + np.repeat(known - (ends - counts), counts)
        index = row * self.block_table.shape[1] + column
        values = running.block_table[row, column]
        if is_new.any():
            rows = moved[is_new]
            own = self._words_at + rows[:, None] * SAMPLING_WORDS + np.arange(SAMPLING_WORDS)
            index = np.concatenate((index, own.ravel()))
            values = np.concatenate((values, _sampling_words(running, rows).ravel()))
        return index, values

    def apply(self, moved: LongArray, index: Tensor, values: Tensor, kernels: KernelSet) -> None:
        """Enqueue the `changes` of these rows."""
        kernels.put(index, values, self._entries)
        self._generations[moved] = self._running.generations[moved]
        self._num_blocks[moved] = self._running.num_blocks[moved]


def _sampling_words(running: RunningRequests, rows: LongArray) -> IntArray:
    """[N, SAMPLING_WORDS], as ops/step_inputs.py has them."""
    words = np.empty((len(rows), SAMPLING_WORDS), np.int32)
    for column, values in enumerate(
        (running.temperature, running.top_k, running.top_p, running.min_p)
    ):
        words[:, column] = values[rows].view(np.int32)
    words[:, 4:] = running.seed[rows].astype("<i8").view("<i4").reshape(-1, 2)
    return words


class Uploads:
    """int32 arrays on their way to the device, all of a step in one copy from pinned memory.

    Two buffers take turns, so that a step can be prepared while the copy of the one before is
    under way. What arrives stays until the next copy.
    """

    def __init__(self, device: CudaDevice, capacity: int) -> None:
        self._device = device
        self._arrived = torch.zeros(capacity, dtype=torch.int32, device=device.torch_device)
        self._buffers = [(device.pinned(capacity, torch.int32), device.event()) for _ in range(2)]
        self._sent = 0

    def send(self, arrays: Sequence[IntArray | LongArray]) -> list[Tensor]:
        """On the device, in this order: arrays of the same lengths are at the same addresses.

        All values fit in 32 bits.
        """
        buffer, copied = self._buffers[self._sent % 2]
        if self._sent >= 2 and not copied.done():
            copied.wait()
        self._sent += 1
        host = buffer.numpy()
        begins = np.cumsum([0, *(_aligned(len(array)) for array in arrays)]).tolist()
        places = [
            slice(begin, begin + len(array))
            for begin, array in zip(begins[:-1], arrays, strict=True)
        ]
        for place, array in zip(places, arrays, strict=True):
            host[place] = array
        end = begins[-1]
        self._device.copy(buffer[:end], self._arrived[:end])
        copied.record()
        return [self._arrived[place] for place in places]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device. R rows, whether they compute anything or not; T' tokens."""

    token_ids: Tensor
    """[T'] int64"""
    positions: Tensor
    """[T'] int64"""
    slot_mapping: Tensor
    """[T'] int64"""
    query_start_loc: Tensor
    """[R + 1] int32"""
    seq_lens: Tensor
    """[R] int32"""
    sampling_rows: Tensor
    """[S] int32"""
    logprob_indices: Tensor
    """[L] int32: of the sampling rows that want log-probabilities, each within its chunk."""


class StepInputMaker:
    """Makes the inputs of each step, at the same addresses in every step of one T'."""

    def __init__(
        self,
        running: RunningRequests,
        kernels: KernelSet,
        device: CudaDevice,
        *,
        block_size: int,
        max_tokens: int,
    ) -> None:
        """`max_tokens`: the largest T'."""
        self.rows = DeviceRows(running, device.torch_device)
        self._running = running
        self._kernels = kernels
        self._block_size = block_size
        capacity = 4 * (running.capacity + 1) + max_tokens + 2 * self.rows.max_changes
        self._uploads = Uploads(device, capacity + 8 * ALIGNMENT)
        self._tokens = torch.zeros(
            (3, _aligned(max_tokens)), dtype=torch.int64, device=device.torch_device
        )

    def make(self, batch: ScheduledBatch, padded: int, logprob_indices: LongArray) -> StepInputs:
        """Enqueue what makes the inputs of a batch, of `padded` tokens with padding."""
        moved = self.rows.moved(batch.rows)
        changes = self.rows.changes(moved)
        sampling_rows = batch.rows[batch.samples]
        query_start_loc, seq_lens = _lengths(batch, self._running.capacity)
        tokens = np.zeros(padded, np.int32)
        tokens[: batch.num_tokens] = _tokens(batch, self._running)
        sent = self._uploads.send(
            [query_start_loc, seq_lens, tokens, sampling_rows, logprob_indices, *changes]
        )
        if len(moved):
            self.rows.apply(moved, sent[5], sent[6], self._kernels)
        token_ids, positions, slot_mapping = self._tokens[:, :padded]
        self._kernels.token_inputs(
            sent[0],
            sent[1],
            sent[2],
            self.rows.last_tokens,
            self.rows.block_table,
            self._block_size,
            token_ids,
            positions,
            slot_mapping,
        )
        return StepInputs(token_ids, positions, slot_mapping, sent[0], sent[1], sent[3], sent[4])


def _lengths(batch: ScheduledBatch, capacity: int) -> tuple[IntArray, IntArray]:
    """[R + 1] query_start_loc and [R] seq_lens of all rows, most of which may have no tokens."""
    query_start_loc = np.zeros(capacity + 1, np.int32)
    query_start_loc[batch.rows + 1] = batch.num_scheduled
    np.cumsum(query_start_loc, out=query_start_loc)
    seq_lens = np.zeros(capacity, np.int32)
    seq_lens[batch.rows] = batch.ends
    return query_start_loc, seq_lens


def _tokens(batch: ScheduledBatch, running: RunningRequests) -> IntArray:
    """[T] as the host knows them: UNKNOWN_TOKEN where a row's last one is still to be sampled."""
    if batch.num_tokens == len(batch):  # all decode
        return running.token_ids[batch.rows, batch.starts]
    counts = batch.num_scheduled
    begins = np.cumsum(counts) - counts
    positions = np.arange(batch.num_tokens) + np.repeat(batch.starts - begins, counts)
    tokens: IntArray = running.token_ids[np.repeat(batch.rows, counts), positions]
    return tokens
