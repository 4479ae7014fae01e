"""Vectors of prompts: hidden states pooled, of decoders chunk by chunk."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from headrace.engine.batch import FloatArray, ScheduledBatch
from headrace.engine.client import FinishReason, RequestOutput
from headrace.engine.request import Request, RunningRequests
from headrace.sampling_params import PoolingParams


class Pooler:
    """Pools the rows of RunningRequests that ask for it, and keeps the sums of their chunks.

    Steps come in the order in which they compute, and the first chunk of a row is its prompt's: a
    request that was preempted begins anew.
    """

    def __init__(self, running: RunningRequests) -> None:
        self._running = running
        self._sums: dict[int, FloatArray] = {}
        """By row: of the hidden states so far, or the first one."""

    def pool(self, batch: ScheduledBatch, hidden: Tensor) -> dict[int, FloatArray]:
        """hidden: [T', E] of a step -> [E] of each pooled row that it brings to its end."""
        vectors: dict[int, FloatArray] = {}
        begins = np.cumsum(batch.num_scheduled) - batch.num_scheduled
        for index, row in enumerate(batch.rows.tolist()):
            if row not in self._running.pooled:
                continue
            params = self._running.request(row).source.pooling
            assert params is not None
            begin, length = int(begins[index]), int(batch.num_scheduled[index])
            own = hidden[begin : begin + length]
            is_first, is_last = int(batch.starts[index]) == 0, bool(batch.samples[index])
            if params.pooling == "last":
                if is_last:
                    [vectors[row]] = _array(own[-1:])
                continue
            if params.pooling == "mean":
                self._sums[row] = _sum(None if is_first else self._sums[row], _array(own))
            elif is_first:
                [self._sums[row]] = _array(own[:1])
            if is_last:
                total = self._sums.pop(row)
                count = int(batch.ends[index]) if params.pooling == "mean" else 1
                vectors[row] = total / np.float32(count)
        return vectors


def pooled(hidden: Tensor, params: PoolingParams) -> FloatArray:
    """hidden: [N, E] of a whole request -> [E]."""
    if params.pooling == "mean":
        mean: FloatArray = _sum(None, _array(hidden)) / np.float32(len(hidden))
        return mean
    vector: FloatArray = _array(hidden[:1] if params.pooling == "cls" else hidden[-1:])[0]
    return vector


def ended_with(request: Request, vector: FloatArray) -> RequestOutput:
    """The one output of a decoder's request, at the end of its prompt."""
    assert request.source.pooling is not None
    return RequestOutput(
        request_id=request.request_id,
        cached_tokens=request.num_cached_tokens,
        scheduled_time=request.scheduled_time,
        finish_reason=FinishReason.STOP,
        vector=finished(vector, request.source.pooling),
        record=request.record(FinishReason.STOP, request.num_prompt_tokens),
    )


def finished(vector: FloatArray, params: PoolingParams) -> bytes:
    """The first `dimensions` of the vector [E], one long if that is asked for, as the wire has it:
    float32, little-endian."""
    values = vector[: params.dimensions].astype(np.float64)
    if params.task == "embed" and params.normalize:
        values /= max(float(np.sqrt(np.square(values).sum())), 1e-12)
    return values.astype("<f4").tobytes()


def _sum(before: FloatArray | None, rows: FloatArray) -> FloatArray:
    """before + rows [N, E], one after another: the bits do not depend on where chunks end."""
    total: FloatArray = np.zeros(rows.shape[1], np.float32) if before is None else before.copy()
    for row in rows:
        total += row
    return total


def _array(hidden: Tensor) -> FloatArray:
    """A copy on the host: the next step has the same memory."""
    array: FloatArray = hidden.float().cpu().numpy().copy()
    return array
