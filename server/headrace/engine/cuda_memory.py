"""What a loaded model needs beside its weights, found by running the largest step on one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from headrace.engine.batch import ScheduledBatch
from headrace.engine.cuda_device import CudaDevice
from headrace.engine.cuda_runner import CudaRunner
from headrace.engine.memory import MemoryBudget
from headrace.engine.request import RunningRequests


def measured_budget(
    estimate: MemoryBudget,
    make_runner: Callable[[RunningRequests, int], CudaRunner],
    device: CudaDevice,
    running: RunningRequests,
    max_num_batched_tokens: int,
) -> MemoryBudget:
    """The budget once more, with what is used. The weights are loaded, the KV cache is not.

    `make_runner` takes running requests and a number of blocks; `running` holds none.
    """
    device.release_unused()
    before = device.free_bytes()
    runner = make_runner(running, 1)
    runner.launch(largest_step(running, max_num_batched_tokens)).result()
    after_step = device.free_bytes()
    reserved = device.reserved_bytes()
    runner.idle()  # captures the largest graph
    first_graph = after_step - device.free_bytes()
    # Beside the pool, which all share, each graph takes memory of the driver.
    beside_pool = max(first_graph - (device.reserved_bytes() - reserved), 0)
    more_graphs = max(len(runner.graphs.sizes) - 1, 0)
    del runner
    device.release_unused()
    return replace(
        estimate,
        weights=estimate.total - estimate.others - before,
        activations=before - after_step,
        graphs=first_graph + more_graphs * beside_pool,
        is_measured=True,
    )


def largest_step(running: RunningRequests, max_num_batched_tokens: int) -> ScheduledBatch:
    """As many rows and tokens as can be, all of which sample. Every block is block 0."""
    rows = np.arange(running.capacity)
    tokens = min(max_num_batched_tokens // len(rows), running.max_model_len - 1)
    running.temperature[:], running.top_p[:] = 1.0, 0.9  # what takes samplers most memory
    running.num_logprobs[:] = -1
    return ScheduledBatch(
        rows=rows,
        generations=running.generations[rows],
        starts=np.zeros(len(rows), np.int32),
        num_scheduled=np.full(len(rows), tokens, np.int32),
        samples=np.ones(len(rows), np.bool_),
        num_tokens=tokens * len(rows),
    )
