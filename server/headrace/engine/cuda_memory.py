"""What a loaded model needs beside its weights, found by running the largest step on one block.

Smaller steps are run, too: so every kernel is loaded before the first request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from headrace.engine.batch import ScheduledBatch
from headrace.engine.cuda_device import CudaDevice
from headrace.engine.cuda_runner import CudaRunner
from headrace.engine.memory import MemoryBudget
from headrace.engine.request import RunningRequests

SIZES_WITHOUT_GRAPHS = (1, 8, 64, 512)
"""Of steps that load the kernels, where no graph says which sizes there are."""
LOGPROBS = {1: 0, 8: 20}
"""How many log-probabilities the rows of a step of that size want."""


def measured_budget(
    estimate: MemoryBudget,
    make_runner: Callable[[RunningRequests, int], CudaRunner],
    device: CudaDevice,
    running: RunningRequests,
    max_num_batched_tokens: int,
) -> MemoryBudget:
    """The budget once more, with what is used. The weights are loaded, the KV cache is not.

    `make_runner` takes running requests and a number of blocks; `running` holds none, and is of no
    use afterwards.
    """
    device.release_unused()
    before = device.free_bytes()
    runner = make_runner(running, 1)
    sizes = runner.graphs.sizes or SIZES_WITHOUT_GRAPHS
    smaller = (size for size in sizes if size < max_num_batched_tokens)
    # The largest step first: the memory of the others is part of its own.
    for size in (max_num_batched_tokens, *smaller):
        running.num_logprobs[:] = LOGPROBS.get(size, -1)
        runner.launch(step_of(running, size)).result()
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


def step_of(running: RunningRequests, num_tokens: int) -> ScheduledBatch:
    """At most so many tokens in as many rows as can be, all of which sample. Every block is
    block 0."""
    rows = np.arange(min(num_tokens, running.capacity))
    tokens = min(num_tokens // len(rows), running.max_model_len - 1)
    running.temperature[:], running.top_p[:] = 1.0, 0.9  # what takes samplers most memory
    return ScheduledBatch(
        rows=rows,
        generations=running.generations[rows],
        starts=np.zeros(len(rows), np.int32),
        num_scheduled=np.full(len(rows), tokens, np.int32),
        samples=np.ones(len(rows), np.bool_),
        num_tokens=tokens * len(rows),
    )
