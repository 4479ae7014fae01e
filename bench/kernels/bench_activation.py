"""SiLU and product on a CPU, beside the reference and a copy of as many bytes in the same run.

PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_activation.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import HEADER, RowsCase, compare, set_up, sizes_in_bytes


def cases() -> Iterator[RowsCase]:
    for tokens, size in ((8, 1536), (64, 1536), (512, 1536), (8, 14336), (512, 14336)):
        gate_up = torch.randn(tokens, 2 * size).bfloat16()
        out = torch.empty(tokens, size, dtype=torch.bfloat16)
        yield RowsCase(
            f"silu_and_mul T={tokens} F={size}",
            lambda kernels, x=gate_up, o=out: kernels.silu_and_mul(x, o),
            sizes_in_bytes({gate_up: 1, out: 1}),
        )


def main() -> None:
    budget = set_up(__doc__.splitlines()[0], "activation")
    print(HEADER)
    with torch.inference_mode():
        for case in cases():
            print(compare("activation", case, budget))


if __name__ == "__main__":
    main()
