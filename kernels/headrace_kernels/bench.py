"""Timers of the microbenchmarks: a kernel beside its reference and a limit of the same run.

They measure and format; the scripts in bench/kernels make the tensors, and print.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from headrace_kernels import dispatch, native
from headrace_kernels.kernel_set import KernelSet

HEADER = f"{'us a call':32} {'reference':>10} {'cpu':>10} {'':>8} {'GB/s':>7} {'of a copy':>10}"


@dataclass(frozen=True)
class RowsCase:
    """A call of an op that reads and writes each value about once."""

    name: str
    call: Callable[[KernelSet], None]
    nbytes: int
    """Read and written."""


def median_seconds(call: Callable[[], object], budget: float = 0.2, repeat: int = 1) -> float:
    """Of one call, timed `repeat` at a time, for about `budget` seconds; the first do not count."""
    for _ in range(repeat):
        call()
    times: list[float] = []
    while sum(times) < budget or len(times) < 5:
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / repeat


def copy_seconds(nbytes: int, budget: float) -> float:
    """The limit of an op on rows: torch copies so many bytes, reads and writes counted."""
    source = torch.ones(max(1, nbytes // 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), budget, 20)


def compare(stem: str, case: RowsCase, budget: float) -> str:
    """A line under HEADER: the kernel `cpu` of a stem beside the reference and a copy."""
    facts = dispatch.KernelFacts(
        device="cpu", arch="", dtype=torch.bfloat16, head_dim=64, page_size=16
    )
    slow, fast = (
        median_seconds(
            functools.partial(case.call, dispatch.choose(facts, {stem: name})), budget, 20
        )
        for name in ("reference", "cpu")
    )
    limit = copy_seconds(case.nbytes, budget)
    return (
        f"{case.name:32} {slow * 1e6:10.1f} {fast * 1e6:10.1f} {slow / fast:7.1f}x"
        f" {case.nbytes / fast / 1e9:7.1f} {limit / fast:10.0%}"
    )


def set_up(description: str, stem: str, arguments: Sequence[str] | None = None) -> float:
    """Parse the options that the scripts share and obey them; the budget of a case in seconds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=("scalar", "avx2", "avx512"), help="default: the best")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds a case and kernel")
    options = parser.parse_args(arguments)
    for op in dispatch.OPS[stem]:
        if (reason := native.missing(op)) is not None:
            parser.error(f"the native kernel is {reason}")
    torch.set_num_threads(options.threads)
    native.set_num_threads(options.threads)
    if options.isa:
        native.set_cpu_isa(options.isa)
    return float(options.budget)


def sizes_in_bytes(tensors: Mapping[torch.Tensor, int]) -> int:
    """The bytes of tensors that are passed over so many times each."""
    return sum(tensor.nbytes * times for tensor, times in tensors.items())
