"""Products of packed weights on a CPU, beside bf16 ones and the limits of the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_quantized_linear.py --threads 2

Few rows are limited by reading weights (more of them than the caches hold, each read once a round),
many by the dot products of bytes; the limits are what a plain read of as much memory and the same
kernel on weights in the nearest cache, the fastest dot products it can do, reach.
"""

from __future__ import annotations

import itertools

import torch

from headrace_kernels import dispatch
from headrace_kernels.bench import median_seconds, set_up
from headrace_kernels.packed_format import PackedFormat
from headrace_kernels.testing import random_packed

Q4, Q4_MINIMUM, Q8 = PackedFormat(4, False), PackedFormat(4, True), PackedFormat(8, False)
SHAPES = (
    ("qkv", Q4_MINIMUM, 960, 576),
    ("gate_up", Q4_MINIMUM, 3072, 576),
    ("gate_up", Q4, 3072, 576),
    ("down", Q4_MINIMUM, 576, 1536),
    ("head", Q8, 49152, 576),
)
ROWS = (1, 8, 16, 64, 256)
WORKING_SET = 64 << 20
FACTS = dispatch.KernelFacts(device="cpu", arch="", dtype=torch.bfloat16, head_dim=64, page_size=16)


def read_rate(budget: float) -> float:
    """Bytes a second of a sum over memory that no cache holds."""
    memory = torch.zeros(WORKING_SET // 4, dtype=torch.float32)
    return memory.nbytes / median_seconds(memory.sum, budget)


def product_seconds(
    fmt: PackedFormat, outer: int, inner: int, rows: int, copies: int, budget: float
) -> float:
    """Of one product, each with the next of so many weights."""
    kernels = dispatch.choose(FACTS)
    packed, _ = random_packed(fmt, outer, inner)
    weights = itertools.cycle([packed.clone() for _ in range(copies)])
    x, out = torch.randn(rows, inner).bfloat16(), torch.empty(rows, outer, dtype=torch.bfloat16)
    return median_seconds(
        lambda: kernels.quantized_linear(x, next(weights), None, out), budget, copies
    )


def dense_seconds(outer: int, inner: int, rows: int, copies: int, budget: float) -> float:
    kernels = dispatch.choose(FACTS)
    weights = itertools.cycle([torch.randn(outer, inner).bfloat16() for _ in range(copies)])
    x, out = torch.randn(rows, inner).bfloat16(), torch.empty(rows, outer, dtype=torch.bfloat16)
    return median_seconds(lambda: kernels.linear(x, next(weights), None, out), budget, copies)


def main() -> None:
    budget = set_up(__doc__.splitlines()[0], "quantized_linear")
    with torch.inference_mode():
        bandwidth = read_rate(budget)
        rows, outer, inner = 96, 512, 576
        peak = 2 * rows * outer * inner / product_seconds(Q8, outer, inner, rows, 1, budget)
        print(f"limits: {bandwidth / 1e9:.1f} GB/s, {peak / 1e12:.3f} TOPS")
        print(
            f"{'us a call':28}{'bf16':>9}{'packed':>9}{'':>8}{'GB/s':>7}{'TOPS':>7}{'of limit':>10}"
        )
        for name, fmt, outer, inner in SHAPES:
            nbytes = fmt.nbytes(outer, inner)
            copies = max(1, WORKING_SET // nbytes)
            for rows in ROWS:
                packed = product_seconds(fmt, outer, inner, rows, copies, budget)
                dense = dense_seconds(outer, inner, rows, max(1, copies // 4), budget)
                operations = 2 * rows * outer * inner
                limit = max(nbytes / bandwidth, operations / peak)
                kind = f"q{fmt.bits}{'_1' if fmt.has_minimum else '_0'}"
                print(
                    f"{f'{name} {kind} T={rows}':28}{dense * 1e6:9.0f}{packed * 1e6:9.0f}"
                    f"{dense / packed:7.1f}x{nbytes / packed / 1e9:7.1f}"
                    f"{operations / packed / 1e12:7.3f}{limit / packed:10.0%}"
                )


if __name__ == "__main__":
    main()
