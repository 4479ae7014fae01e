"""Sampling on a CPU, beside the reference and the limits of the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_sampling.py --threads 2

Bytes count each logit once: the limit of a greedy row; others are read two or three times.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from headrace_kernels.bench import Case, sizes_in_bytes, table
from headrace_kernels.ops.sampling import sample_tokens, token_logprobs

VOCAB_SIZE = 49_152
ROWS: dict[str, tuple[int, ...]] = {"greedy": (1, 16, 32)}
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "T=1": {},
    "T=1 top_k=50": {"top_k": 50},
    "T=1 top_p=0.9": {"top_p": 0.9},
    "T=1 top_k=50 top_p=0.9": {"top_k": 50, "top_p": 0.9},
    "T=1 min_p=0.05": {"min_p": 0.05},
}


def cases() -> Iterator[Case]:
    for name, filters in FILTERS.items():
        for rows in ROWS.get(name, (1, 16)):
            # The spread of a language model's logits: the likeliest token has a few percent.
            logits = torch.randn(rows, VOCAB_SIZE) * 2.5
            values = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | filters
            columns = {key: torch.full((rows,), value) for key, value in values.items()}
            columns["top_k"] = torch.full((rows,), int(filters.get("top_k", 0)), dtype=torch.int32)
            columns["temperature"] = columns["temperature"].float()
            columns |= {"seeds": torch.full((rows,), 7), "positions": torch.arange(rows)}
            call = functools.partial(sample_tokens, logits, **columns)
            yield Case(
                f"{name} R={rows}",
                lambda kernels, call=call: call(kernels=kernels),
                sizes_in_bytes({logits: 1}),
                operations=logits.numel(),
            )
    for k in (0, 20):
        logits = torch.randn(16, VOCAB_SIZE) * 2.5
        ids = torch.zeros(16, dtype=torch.int64)
        yield Case(
            f"logprobs k={k} R=16",
            lambda kernels, x=logits, ids=ids, k=k: token_logprobs(x, ids, k, kernels),
            sizes_in_bytes({logits: 1}),
            operations=logits.numel(),
        )


if __name__ == "__main__":
    for row in table(__doc__.splitlines()[0], "sampling", cases()):
        print(row, flush=True)
