"""RoPE and KV write on a CPU, beside the reference and the limits of the same run.

PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_rope.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import Case, sizes_in_bytes, table

PAGE_SIZE = 16


def cases() -> Iterator[Case]:
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128)):
        weight = torch.ones(dim)
        for tokens in (1, 8, 64, 512):
            qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).bfloat16()
            q = torch.empty(tokens, heads, dim, dtype=torch.bfloat16)
            blocks = -(-tokens // PAGE_SIZE)
            cache = torch.zeros(blocks, 2, kv_heads, PAGE_SIZE, dim, dtype=torch.bfloat16)
            positions, table = torch.arange(tokens), torch.randn(tokens, 2, dim // 2)
            rotated = tokens * (heads + kv_heads) * dim
            for norm, suffix in ((None, ""), (weight, " QK-norm")):
                arguments = (qkv, positions, table, cache, positions, q, norm, norm, 1e-6)
                yield Case(
                    f"H={heads} K={kv_heads} D={dim} T={tokens}{suffix}",
                    lambda kernels, arguments=arguments: kernels.rope_and_write_kv(*arguments),
                    sizes_in_bytes({qkv: 2, table: 1}),
                    operations=rotated * (3 if norm is None else 7),
                )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "rope", cases()):
        print(row, flush=True)
