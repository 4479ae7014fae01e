"""Sampling on a CPU, beside the reference and a plain read of the same logits in the same run.

    PYTHONPATH=server:kernels .venv/bin/python bench/kernels/bench_sampling.py --threads 2

Kernel, reference and read (torch's largest element of the whole) take turns, so that a slow moment
of the machine is one of all three; the shortest times are printed. Reading each logit once is the
limit of a greedy row; others read it two or three times.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace_kernels import dispatch, native
from headrace_kernels.bench import set_up
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.ops.sampling import sample_tokens, token_logprobs

VOCAB_SIZE = 49_152
FACTS = dispatch.KernelFacts(device="cpu", arch="", dtype=torch.bfloat16, head_dim=64, page_size=16)
ROWS: dict[str, tuple[int, ...]] = {"greedy": (1, 16, 32)}
FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "T=1": {},
    "T=1 top_k=50": {"top_k": 50},
    "T=1 top_p=0.9": {"top_p": 0.9},
    "T=1 top_k=50 top_p=0.9": {"top_k": 50, "top_p": 0.9},
    "T=1 min_p=0.05": {"min_p": 0.05},
}


def cases() -> Iterator[tuple[str, Tensor, Callable[[KernelSet], Any]]]:
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
            yield f"{name} R={rows}", logits, lambda kernels, call=call: call(kernels=kernels)
    for k in (0, 20):
        logits = torch.randn(16, VOCAB_SIZE) * 2.5
        ids = torch.zeros(16, dtype=torch.int64)
        yield (
            f"logprobs k={k} R=16",
            logits,
            lambda kernels, x=logits, ids=ids, k=k: token_logprobs(x, ids, k, kernels),
        )


def shortest_seconds(calls: Sequence[Callable[[], Any]], budget: float) -> list[float]:
    """The shortest call of each; they take turns for about `budget` seconds each."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < budget * len(calls) or len(times[0]) < 9:
        for call, own in zip(calls, times, strict=True):
            call()  # finds its data where it leaves it, as do the calls that are timed
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def main() -> None:
    budget = set_up(__doc__.splitlines()[0], "sampling")
    fast, slow = (dispatch.choose(FACTS, {"sampling": name}) for name in ("cpu", "reference"))
    print(f"{native.cpu_isa()}, {native.num_threads()} threads, V={VOCAB_SIZE}")
    print(
        f"{'us a call':32} {'reference':>10} {'cpu':>10} {'':>8} {'GB/s':>7} {'read GB/s':>10}"
        f" {'of a read':>10}"
    )
    with torch.inference_mode():
        for name, logits, call in cases():
            calls = (lambda c=call: c(slow), lambda c=call: c(fast), logits.max)
            old, new, read = shortest_seconds(calls, budget)
            print(
                f"{name:32} {old * 1e6:10.1f} {new * 1e6:10.1f} {old / new:7.1f}x"
                f" {logits.nbytes / new / 1e9:7.1f} {logits.nbytes / read / 1e9:10.1f}"
                f" {read / new:10.0%}"
            )


if __name__ == "__main__":
    main()
