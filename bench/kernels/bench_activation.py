"""SiLU and product on a CPU, beside the reference and the limits of the same run.

PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_activation.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import Case, sizes_in_bytes, table


def cases() -> Iterator[Case]:
    for tokens, size in ((1, 1536), (8, 1536), (64, 1536), (512, 1536), (8, 14336), (512, 14336)):
        gate_up = torch.randn(tokens, 2 * size).bfloat16()
        out = torch.empty(tokens, size, dtype=torch.bfloat16)
        yield Case(
            f"silu_and_mul T={tokens} F={size}",
            lambda kernels, x=gate_up, o=out: kernels.silu_and_mul(x, o),
            sizes_in_bytes({gate_up: 1, out: 1}),
            operations=4 * tokens * size,
        )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "activation", cases()):
        print(row, flush=True)
