"""RMSNorm on a CPU, beside the reference and a copy of as many bytes in the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_norm.py --threads 2

T = 8 shows the cost of a call: a step of a 30-layer model makes 61 of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import HEADER, RowsCase, compare, set_up, sizes_in_bytes


def cases() -> Iterator[RowsCase]:
    for tokens, size in ((8, 576), (64, 576), (512, 576), (8, 4096), (512, 4096)):
        x = torch.randn(tokens, size).bfloat16()
        residual, weight, out = torch.zeros(tokens, size), torch.ones(size), torch.empty_like(x)
        yield RowsCase(
            f"rms_norm T={tokens} E={size}",
            lambda kernels, r=residual, w=weight, o=out: kernels.rms_norm(r, w, 1e-5, o),
            sizes_in_bytes({residual: 1, out: 1}),
        )
        yield RowsCase(
            f"add_rms_norm T={tokens} E={size}",
            lambda kernels, x=x, r=residual, w=weight, o=out: kernels.add_rms_norm(
                x, r, w, 1e-5, o
            ),
            sizes_in_bytes({x: 1, residual: 2, out: 1}),
        )


def main() -> None:
    budget = set_up(__doc__.splitlines()[0], "norm")
    print(HEADER)
    with torch.inference_mode():
        for case in cases():
            print(compare("norm", case, budget))


if __name__ == "__main__":
    main()
