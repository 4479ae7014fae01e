"""What the kernel tests share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from headrace_kernels import dispatch, native
from headrace_kernels.kernel_set import KernelSet

ISA_LEVELS = ("scalar", "avx2", "avx512")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Thread counts among which work is split at different elements."""
    before, native_before = torch.get_num_threads(), native.num_threads()
    torch.set_num_threads(request.param)
    native.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
    native.set_num_threads(native_before)


@contextlib.contextmanager
def native_level(isa: str) -> Iterator[str]:
    if reason := native.unavailable():
        pytest.skip(f"native kernels: {reason}")
    before = native.cpu_isa()
    try:
        native.set_cpu_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield isa
    native.set_cpu_isa(before)


@pytest.fixture(params=ISA_LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU, for the native kernels."""
    with native_level(request.param) as level:
        yield level


def wherever_it_runs(candidate: str, facts: dispatch.KernelFacts) -> dict[str, str]:
    """An explicit choice of each stem: this candidate, or the reference where it declines."""
    return {
        stem: candidate
        if any(c.name == candidate and c.declines(facts) is None for c in candidates)
        else "reference"
        for stem, candidates in dispatch.CANDIDATES.items()
    }


@pytest.fixture(params=("reference", *ISA_LEVELS))
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Runs a test of the public ops on the reference and on every level of the native kernels.

    What can be interpreted (no arithmetic on bfloat16, small tensors) also takes "triton":
    @pytest.mark.parametrize("implementation", [...], indirect=True).
    """
    if request.param in ISA_LEVELS:
        with native_level(request.param) as level:
            yield level
        return

    @functools.cache
    def choose(facts: dispatch.KernelFacts) -> KernelSet:
        return dispatch.choose(facts, wherever_it_runs(request.param, facts))

    monkeypatch.setattr(dispatch, "_automatic", choose)
    yield request.param
