"""Every kernel against its reference in higher precision, over random shapes.

A stem whose trials all pass is written to verified.json: dispatch chooses it from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from bench.gpu_stages.machine import Machine
from bench.gpu_stages.record import Case, Record, Result
from bench.gpu_stages.trials import TRIALS, Trial
from torch import Tensor

from headrace_kernels import dispatch, verified
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.testing import assert_close

TRIALS_OF_A_STEM, TINY_TRIALS = 24, 2


def kernels_here(machine: Machine) -> list[tuple[str, str]]:
    """(candidate, stem) of what is not the reference and can run here."""
    facts = machine.facts()
    return [
        (candidate.name, stem)
        for stem, candidates in dispatch.CANDIDATES.items()
        for candidate in candidates
        if candidate.name not in ("reference", "cpu") and candidate.declines(facts) is None
    ]


def cases(machine: Machine) -> Iterator[Case]:
    for candidate, stem in kernels_here(machine):
        for number in range(machine.size(TRIALS_OF_A_STEM, TINY_TRIALS)):
            name = f"{candidate} {stem} {number}"
            yield Case(name, functools.partial(_check, machine, candidate, stem, name))


def vouch(machine: Machine, record: Record) -> None:
    """Write to verified.json what passed on this GPU; a dry run vouches for nothing."""
    if machine.dry_run:
        return
    results = record.results("check")
    for candidate, stem in kernels_here(machine):
        own = [results.get(f"{candidate} {stem} {number}") for number in range(TRIALS_OF_A_STEM)]
        passed = [result for result in own if result is not None and "error" not in result]
        ran = any("declined" not in result for result in passed)
        if ran and len(passed) == len(own):
            verified.record_verified(candidate, stem, machine.arch)


def _check(machine: Machine, candidate: str, stem: str, name: str) -> Result:
    trial: Trial = TRIALS[stem](machine, machine.generator(name.partition(" ")[2]))
    facts = machine.facts(trial.head_dim, trial.page_size)
    (tried,) = (c for c in dispatch.CANDIDATES[stem] if c.name == candidate)
    if reason := tried.declines(facts):
        return {"shape": trial.shape, "declined": reason}
    kernels = dispatch.choose(facts, {stem: candidate})
    with torch.inference_mode():
        first, second = trial.call(kernels), trial.call(kernels)
        machine.synchronize()
    if machine.device.type in tried.invariant_on and not machine.dry_run:
        _check_rows(trial, kernels, first)
    worst = 0.0
    for own, again, expected in zip(first, second, trial.expected, strict=True):
        if not torch.equal(_bytes(own), _bytes(again)):
            raise AssertionError(f"{trial.shape}: two runs differ")
        if trial.tolerance is None:
            if not torch.equal(_bytes(own.cpu()), _bytes(expected.cpu())):
                raise AssertionError(f"{trial.shape}: differs from the reference")
            continue
        try:
            assert_close(own, expected, trial.tolerances.get(candidate, trial.tolerance))
        except AssertionError as error:
            raise AssertionError(f"{trial.shape}: {error}") from None
        error_norm = torch.linalg.vector_norm(own.double().cpu() - expected.double().cpu())
        norm = torch.linalg.vector_norm(expected.double().cpu())
        worst = max(worst, float(error_norm / norm) if norm else 0.0)
    return {"shape": trial.shape, "relative error": worst}


def _check_rows(trial: Trial, kernels: KernelSet, whole: Sequence[Tensor]) -> None:
    """Some rows alone have the bits that they have among all: few and many, first and last."""
    if trial.of_rows is None:
        return
    rows = len(whole[0])
    for begin, end in ((0, 1), (rows - 1, rows), (0, 17), (rows // 3, rows // 3 + 65), (1, rows)):
        own = slice(min(begin, rows - 1), min(end, rows))
        with torch.inference_mode():
            alone = trial.of_rows(kernels, own)
        for part, every in zip(alone, whole, strict=True):
            if not torch.equal(_bytes(part), _bytes(every[own])):
                raise AssertionError(f"{trial.shape}: rows {own} alone have other bits")


def _bytes(tensor: Tensor) -> Tensor:
    """Bits, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
