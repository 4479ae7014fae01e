"""Products of packed weights on a CPU, beside the reference and the limits of the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_quantized_linear.py --threads 2

Few rows are limited by reading weights, many by the dot products of bytes; the shapes are
SmolLM2-135M's. bench_linear.py has the same shapes in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import Case, in_turn, table
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
BITS = (("", 8, "int8"), (" exact", 16, "bf16"))
"""Of activations, and the dot products that they limit."""


def cases() -> Iterator[Case]:
    for name, fmt, outer, inner in SHAPES:
        weight = in_turn(lambda f=fmt, o=outer, i=inner: random_packed(f, o, i)[0])
        for rows in (1, 8, 16, 64, 256):
            x, out = torch.randn(rows, inner).bfloat16(), torch.empty(rows, outer).bfloat16()
            kind = f"q{fmt.bits}{'_1' if fmt.has_minimum else '_0'}"
            for mode, bits, arithmetic in BITS:
                yield Case(
                    f"{name} {kind}{mode} T={rows}",
                    lambda kernels, x=x, w=weight, f=fmt, b=bits, o=out: kernels.quantized_linear(
                        x, w(), f, b, None, o
                    ),
                    fmt.nbytes(outer, inner) + x.nbytes + out.nbytes,
                    operations=2 * rows * outer * inner,
                    arithmetic=arithmetic,
                    from_memory=True,
                )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "quantized_linear", cases()):
        print(row, flush=True)
