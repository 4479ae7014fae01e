"""Dense matrix products on a CPU, beside torch's and the limits of the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_linear.py --threads 2

Few rows are limited by reading weights, many by arithmetic; the shapes are SmolLM2-135M's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import Arithmetic, Case, in_turn, table

SHAPES = (
    ("qkv", 960, 576),
    ("o", 576, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("head", 49152, 576),
)
DTYPES: tuple[tuple[Arithmetic, torch.dtype], ...] = (
    ("bf16", torch.bfloat16),
    ("fp32", torch.float32),
)


def cases() -> Iterator[Case]:
    for arithmetic, dtype in DTYPES:
        for name, outer, inner in SHAPES:
            weight = in_turn(lambda o=outer, i=inner, d=dtype: torch.randn(o, i).to(d))
            for rows in (1, 8, 16, 64, 256):
                x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
                yield Case(
                    f"{name} {arithmetic} T={rows}",
                    lambda kernels, x=x, w=weight, o=out: kernels.linear(x, w(), None, o),
                    outer * inner * dtype.itemsize + x.nbytes + out.nbytes,
                    operations=2 * rows * outer * inner,
                    arithmetic=arithmetic,
                    from_memory=True,
                )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "linear", cases()):
        print(row, flush=True)
