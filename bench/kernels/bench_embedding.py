"""Embedding rows on a CPU, beside the reference and the limits of the same run.

PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_embedding.py --threads 2
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headrace_kernels.bench import Case, sizes_in_bytes, table

VOCAB_SIZE, SIZE = 49_152, 576


def cases() -> Iterator[Case]:
    weight = torch.randn(VOCAB_SIZE, SIZE).bfloat16()
    for tokens in (1, 16, 512):
        token_ids = torch.randint(VOCAB_SIZE, (tokens,))
        out = torch.empty(tokens, SIZE)
        yield Case(
            f"embedding T={tokens} E={SIZE}",
            lambda kernels, ids=token_ids, o=out: kernels.embedding(ids, weight, o),
            sizes_in_bytes({out: 1}) + tokens * SIZE * weight.element_size(),
            operations=tokens * SIZE,
        )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "embedding", cases()):
        print(row, flush=True)
