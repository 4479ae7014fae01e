"""Paged attention on a CPU: microseconds a call, beside the reference and the limits of this run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_attention.py --threads 2

Decode is limited by reading K and V, prefill by arithmetic; both limits are measured in the same
run, with torch on as many threads: the sum of a large tensor, and an fp32 matrix product (scores
of bf16 may run faster than that). Layers are visited in turn, so that large batches come from
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace_kernels import native
from headrace_kernels.bench import median_seconds, set_up
from headrace_kernels.dispatch import KernelFacts, choose
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


@dataclass(frozen=True)
class Ceilings:
    bytes_per_second: float
    flops: float


def measure_ceilings() -> Ceilings:
    data = torch.ones(64 << 20)
    matrix = torch.randn(1024, 1024)
    product = torch.empty(1024, 1024)
    read = median_seconds(data.sum, 0.3)
    multiply = median_seconds(lambda: torch.mm(matrix, matrix, out=product), 0.3)
    return Ceilings(data.nbytes / read, 2 * 1024**3 / multiply)


def bench(name: str, lengths: Sequence[tuple[int, int]], ceilings: Ceilings, budget: float) -> None:
    batch = ragged_batch(lengths, PAGE_SIZE, np.random.default_rng(0))
    whole = torch.randn(batch.num_blocks, LAYERS, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM).bfloat16()
    q = torch.randn(batch.num_rows, NUM_HEADS, HEAD_DIM).bfloat16()
    out, metadata, layer = torch.empty_like(q), batch.metadata(), 0

    def call(op: Callable[..., None]) -> Callable[[], None]:
        def attend() -> None:
            nonlocal layer
            layer = (layer + 1) % LAYERS
            op(q, whole[:, layer], metadata, HEAD_DIM**-0.5, None, None, out)

        return attend

    kv_bytes = (
        sum(context for _, context in lengths) * 2 * KV_HEADS * HEAD_DIM * whole.element_size()
    )
    seen = sum(queries * (context - (queries - 1) / 2) for queries, context in lengths)
    flops = 4 * NUM_HEADS * HEAD_DIM * seen
    facts = KernelFacts(
        device="cpu", arch="", dtype=q.dtype, head_dim=HEAD_DIM, page_size=PAGE_SIZE
    )
    slow, fast = (
        median_seconds(call(choose(facts, {"attention": kernel}).paged_attention), budget)
        for kernel in ("reference", "cpu")
    )
    print(
        f"{name:34} {slow * 1e6:10.1f} {fast * 1e6:10.1f} {slow / fast:7.1f}x"
        f" {kv_bytes / fast / 1e9:7.1f} {kv_bytes / fast / ceilings.bytes_per_second:6.0%}"
        f" {flops / fast / 1e9:9.1f} {flops / fast / ceilings.flops:6.0%}"
    )


def main() -> None:
    budget = set_up(__doc__.splitlines()[0], "attention")
    ceilings = measure_ceilings()
    print(
        f"{native.cpu_isa()}, {native.num_threads()} threads, heads {NUM_HEADS}/{KV_HEADS} of"
        f" {HEAD_DIM}, bf16; limits: reads {ceilings.bytes_per_second / 1e9:.1f} GB/s, fp32"
        f" {ceilings.flops / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'us a call':34} {'reference':>10} {'cpu':>10} {'':>8} {'GB/s':>7} {'':>6} {'GFLOP/s':>9}"
    )
    with torch.inference_mode():
        for name, lengths in CASES.items():
            bench(name, lengths, ceilings, budget)


if __name__ == "__main__":
    main()
