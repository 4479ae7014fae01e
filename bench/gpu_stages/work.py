"""Work: the calls that do the same, ours and others', with the bytes and operations they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.gpu_stages.check import kernels_here
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.record import Result
from torch import Tensor

from headrace_kernels import dispatch
from headrace_kernels.kernel_set import KernelSet

CACHE_BYTES = 256 << 20
"""More than four times the L2 of an H200: inputs take turns until they come from memory."""
Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Ceilings:
    copy: float
    """Bytes a second, read and written."""
    read: float
    operations: Mapping[str, float]
    """Operations a second of a large product, by type."""

    def microseconds(self, nbytes: float, operations: float, arithmetic: str) -> float:
        rate = self.operations.get(arithmetic, self.operations["bf16"])
        return max(nbytes / max(self.copy, self.read), operations / rate) * 1e6

    def result(self) -> Result:
        rates = {f"{name} TFLOP/s": rate / 1e12 for name, rate in self.operations.items()}
        return {"copy TB/s": self.copy / 1e12, "read TB/s": self.read / 1e12, **rates}


@dataclass(frozen=True)
class Work:
    calls: Calls
    ours: frozenset[str]
    nbytes: float
    operations: float
    arithmetic: str = "bf16"
    repeats: int = 1
    """How often a call does the work, each time on other inputs."""


Named = Iterator[tuple[str, Callable[[], Work]]]


def own_kernels(machine: Machine, stem: str, *, head_dim: int = 128) -> dict[str, KernelSet]:
    """A set for each candidate of a stem that can run here."""
    return {
        candidate: dispatch.choose(machine.facts(head_dim), {stem: candidate})
        for candidate, of_stem in kernels_here(machine)
        if of_stem == stem
    }


def in_turn(
    makers: Mapping[str, Callable[..., object]], sets: Sequence[tuple[Tensor, ...]]
) -> Calls:
    """Calls that go once through all sets of inputs."""

    def through(call: Callable[..., object]) -> Callable[[], object]:
        return lambda: [call(*inputs) for inputs in sets]

    return {name: through(call) for name, call in makers.items()}


def input_sets(
    machine: Machine, make: Callable[[], tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    first = make()
    nbytes = sum(tensor.nbytes for tensor in first)
    more = 1 if machine.dry_run else min(CACHE_BYTES // max(nbytes, 1), 63)
    return [first, *(make() for _ in range(more))]
