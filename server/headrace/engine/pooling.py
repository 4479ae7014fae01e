"""Vectors of prompts: hidden states pooled, of decoders chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from headrace.engine.batch import FloatArray, ScheduledBatch
from headrace.engine.client import FinishReason, RequestOutput
from headrace.engine.request import Request, RunningRequests
from headrace.sampling_params import PoolingParams


class PooledSpan(NamedTuple):
    """Tokens of a step of one request that is pooled."""

    row: int
    pooling: str
    hidden: Tensor
    """[N, E] behind those that the pooling needs."""
    is_first: bool
    num_tokens: int | None
    """Of the whole request, if this is its end."""


class Pooler:
    """Pools the rows of RunningRequests that ask for it, and keeps the sums of their chunks.

    Steps come in the order in which they compute, and the first chunk of a row is its prompt's: a
    request that was preempted begins anew.
    """

    def __init__(self, running: RunningRequests) -> None:
        self._running = running
        self._sums: dict[int, FloatArray] = {}
        """By row: of the hidden states so far, or the first one."""

    def spans(self, batch: ScheduledBatch, hidden: Tensor) -> list[PooledSpan]:
        """What a step that is launched computes of the rows that are pooled. hidden: [T', E]."""
        found: list[PooledSpan] = []
        begins = np.cumsum(batch.num_scheduled) - batch.num_scheduled
        for index, row in enumerate(batch.rows.tolist()):
            if row not in self._running.pooled:
                continue
            params = self._running.request(row).source.pooling
            assert params is not None
            begin = int(begins[index])
            own = hidden[begin : begin + int(batch.num_scheduled[index])]
            is_first, is_last = int(batch.starts[index]) == 0, bool(batch.samples[index])
            num_tokens = int(batch.ends[index]) if is_last else None
            if params.pooling == "last":
                own = own[-1:] if is_last else own[:0]
            elif params.pooling == "cls":
                own = own[:1] if is_first else own[:0]
            found.append(PooledSpan(row, params.pooling, own, is_first, num_tokens))
        return found

    def pool(self, spans: Iterable[PooledSpan]) -> dict[int, FloatArray]:
        """Their hidden states are on the host now -> [E] of each row that comes to its end."""
        vectors: dict[int, FloatArray] = {}
        for row, pooling, hidden, is_first, num_tokens in spans:
            before = None if is_first or pooling == "last" else self._sums[row]
            total = self._sums[row] = _sum(before, _array(hidden))
            if num_tokens is not None:
                vectors[row] = total / np.float32(num_tokens if pooling == "mean" else 1)
                del self._sums[row]
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
