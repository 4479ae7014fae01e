"""Paged attention on a CPU, beside the reference and the limits of the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_attention.py --threads 2

Decode is limited by reading K and V, prefill by arithmetic. Layers are visited in turn, so that
large batches come from memory; those that the caches hold may exceed the limit of memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from headrace_kernels.bench import Case, table
from headrace_kernels.testing import ragged_batch

NUM_HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
LAYERS = 8
PAGE_SIZE = 16
DECODES: dict[str, Sequence[tuple[int, int]]] = {
    f"decode R={requests} ctx={context}": [(1, context)] * requests
    for context in (100, 1000)
    for requests in (1, 16, 64)
}
CASES: dict[str, Sequence[tuple[int, int]]] = DECODES | {
    "decode R=1 ctx=16000": [(1, 16000)],
    "prefill 256": [(256, 256)],
    "prefill 256 behind 1000": [(256, 1256)],
    "decode R=16 ctx=500 + prefill 128": [(1, 500)] * 16 + [(128, 128)],
}


def cases() -> Iterator[Case]:
    for name, lengths in CASES.items():
        batch = ragged_batch(lengths, PAGE_SIZE, np.random.default_rng(0))
        whole = torch.randn(batch.num_blocks, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM).bfloat16()
        q = torch.randn(batch.num_rows, NUM_HEADS, HEAD_DIM).bfloat16()
        arguments = (batch.metadata(), HEAD_DIM**-0.5, None, None, torch.empty_like(q))
        layers = itertools.cycle(range(LAYERS))
        kv_values = sum(context for _, context in lengths) * 2 * KV_HEADS * HEAD_DIM
        seen = sum(queries * (context - (queries - 1) / 2) for queries, context in lengths)
        yield Case(
            name,
            lambda kernels, q=q, kv=whole, layers=layers, rest=arguments: kernels.paged_attention(
                q, kv[:, next(layers)], *rest
            ),
            kv_values * whole.element_size() + 2 * q.nbytes,
            operations=4 * NUM_HEADS * HEAD_DIM * seen,
            arithmetic="bf16",
            from_memory=True,
        )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "attention", cases()):
        print(row, flush=True)
