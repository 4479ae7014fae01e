"""What the microbenchmarks share: a kernel beside its reference and the limits of the same run.

It measures and formats; the scripts in bench/kernels make the tensors.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace_kernels import dispatch, native
from headrace_kernels.cpu.pages import Arena, empty
from headrace_kernels.kernel_set import KernelSet

Arithmetic = Literal["fp32", "bf16", "int8"]
MEMORY_BYTES = 64 << 20
"""More than the caches hold: what is read in turn from so much comes from memory."""
CACHED_BYTES = 1 << 20
BLOCK_SECONDS, MOST_AT_A_TIME = 0.005, 1000
CHUNK_BYTES = 256 << 10
"""Of one chunk of headrace::ceiling."""
FACTS = dispatch.KernelFacts(device="cpu", arch="", dtype=torch.bfloat16, head_dim=64, page_size=16)


@dataclass(frozen=True)
class Case:
    """A call of an op. What a step of a model has just written or read is small, and cached."""

    name: str
    call: Callable[[KernelSet], object]
    nbytes: int
    """Read and written, each once."""
    operations: float
    """Additions and multiplications; other functions count as one."""
    arithmetic: Arithmetic = "fp32"
    """Which instructions can make them."""
    from_memory: bool = False
    """Whether each call reads other tensors, of MEMORY_BYTES in all."""


@dataclass(frozen=True)
class Ceilings:
    """What the threads and the instruction set in use can do at most, measured."""

    memory: float
    """Bytes a second read from memory."""
    cache: float
    """Bytes a second read from a cache, CACHED_BYTES in all."""
    operations: Mapping[Arithmetic, float]
    """Additions and multiplications a second, in registers."""

    def seconds(self, case: Case) -> tuple[float, str]:
        """The least time that `case` can take, and what it would be spent on."""
        reads = "memory" if case.from_memory else "cache"
        moving = case.nbytes / (self.memory if case.from_memory else self.cache)
        computing = case.operations / self.operations[case.arithmetic]
        return (moving, reads) if moving > computing else (computing, case.arithmetic)

    def __str__(self) -> str:
        rates = [f"{name} {rate / 1e12:.3f} TOPS" for name, rate in self.operations.items()]
        reads = f"memory {self.memory / 1e9:.1f} GB/s, cache {self.cache / 1e9:.1f} GB/s"
        return ", ".join((reads, *rates))


def measure_ceilings(budget: float = 0.1) -> Ceilings:
    """The limits of the native pool as it is set, in about six times `budget` seconds."""

    def rate(kind: str, chunks: int) -> float:
        done = torch.empty(chunks, dtype=torch.float64)
        seconds = median_seconds(lambda: torch.ops.headrace.ceiling(kind, memory, done), budget)
        return float(done.sum()) / seconds

    memory = empty(MEMORY_BYTES // 4, dtype=torch.float32).fill_(1)
    kinds: tuple[Arithmetic, ...] = ("fp32", "bf16", "int8")
    return Ceilings(
        memory=rate("read", MEMORY_BYTES // CHUNK_BYTES),
        cache=rate("read", CACHED_BYTES // CHUNK_BYTES),
        operations={kind: rate(kind, 16 * native.num_threads()) for kind in kinds},
    )


def median_seconds(call: Callable[[], object], budget: float = 0.2) -> float:
    """Of one call, timed for about `budget` seconds; the first ones do not count."""
    return medians((call,), budget)[0]


def medians(calls: Sequence[Callable[[], object]], budget: float) -> list[float]:
    """Seconds of each call. They are timed in turn, so that all meet the same machine, and so many
    at a time that what the others left in the caches matters little."""
    repeats: list[int] = []
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
        repeats.append(max(1, min(MOST_AT_A_TIME, int(BLOCK_SECONDS / seconds(call, 1)))))
    while sum(map(sum, times)) < budget or len(times[0]) < 3:
        for call, repeat, own in zip(calls, repeats, times, strict=True):
            own.append(seconds(call, repeat))
    return [statistics.median(own) / repeat for own, repeat in zip(times, repeats, strict=True)]


def seconds(call: Callable[[], object], repeat: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - begin


def in_turn(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that returns the next of as many tensors as fill MEMORY_BYTES, laid out as a
    model lays out its own."""
    first, arena = make(), Arena()
    tensors = [
        arena.empty(*first.shape, dtype=first.dtype)
        for _ in range(1 + MEMORY_BYTES // first.nbytes)
    ]
    for tensor in tensors:
        tensor.copy_(first)
    return functools.partial(next, itertools.cycle(tensors))


def table(
    description: str, stem: str, cases: Iterable[Case], arguments: Sequence[str] | None = None
) -> Iterator[str]:
    """The whole of a script: parse the options, measure the limits, give a line a case."""
    budget = set_up(description, stem, arguments)
    ceilings = measure_ceilings(budget)
    yield f"{native.cpu_isa()}, {native.num_threads()} threads; limits: {ceilings}"
    yield (
        f"{'us a call':34}{'reference':>11}{'cpu':>10}{'':>8}{'KB':>9}{'MFLOP':>9}{'GB/s':>8}"
        f"{'TOPS':>8}  of the limit"
    )
    choices = [dispatch.choose(FACTS, {stem: name}) for name in ("reference", "cpu")]
    with torch.inference_mode():
        for case in cases:
            calls = [functools.partial(case.call, kernels) for kernels in choices]
            yield line(case, ceilings, *medians(calls, 2 * budget))


def line(case: Case, ceilings: Ceilings, reference: float, seconds: float) -> str:
    """A row of `table`."""
    limit, bound = ceilings.seconds(case)
    return (
        f"{case.name:34}{reference * 1e6:11.1f}{seconds * 1e6:10.1f}{reference / seconds:7.1f}x"
        f"{case.nbytes / 1e3:9.0f}{case.operations / 1e6:9.2f}{case.nbytes / seconds / 1e9:8.1f}"
        f"{case.operations / seconds / 1e12:8.3f}  {limit / seconds:4.0%} {bound}"
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


def sizes_in_bytes(tensors: Mapping[Tensor, int]) -> int:
    """The bytes of tensors that are passed over so many times each."""
    return sum(tensor.nbytes * times for tensor, times in tensors.items())
