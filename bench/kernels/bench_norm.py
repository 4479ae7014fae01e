"""RMSNorm on a CPU, beside the reference and the limits of the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_norm.py --threads 2

Few rows show the cost of a call: a step of a 30-layer model makes 61 of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import Case, sizes_in_bytes, table


def cases() -> Iterator[Case]:
    for tokens, size in ((1, 576), (8, 576), (64, 576), (512, 576), (8, 4096), (512, 4096)):
        x = torch.randn(tokens, size).bfloat16()
        residual, weight, out = torch.zeros(tokens, size), torch.ones(size), torch.empty_like(x)
        yield Case(
            f"rms_norm T={tokens} E={size}",
            lambda kernels, r=residual, w=weight, o=out: kernels.rms_norm(r, w, 1e-5, o),
            sizes_in_bytes({residual: 1, out: 1}),
            operations=4 * tokens * size,
        )
        yield Case(
            f"add_rms_norm T={tokens} E={size}",
            lambda kernels, x=x, r=residual, w=weight, o=out: kernels.add_rms_norm(
                x, r, w, 1e-5, o
            ),
            sizes_in_bytes({x: 1, residual: 2, out: 1}),
            operations=5 * tokens * size,
        )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "norm", cases()):
        print(row, flush=True)
