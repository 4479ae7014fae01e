from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from headrace_kernels import dispatch, verified
from headrace_kernels.dispatch import Candidate, KernelFacts, KernelUnavailableError
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.reference import activation, attention, norm

FACTS = KernelFacts(device="cpu", arch="x86_64", dtype=torch.float32, head_dim=64, page_size=16)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the candidates that are everywhere."""
    candidates = {
        stem: tuple(c for c in candidates if c.name == "reference")
        for stem, candidates in dispatch.CANDIDATES.items()
    }
    monkeypatch.setattr(dispatch, "CANDIDATES", candidates)


@pytest.fixture
def picky(plain: None, monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """A first candidate for `norm` that wants bfloat16."""
    candidate = Candidate(
        "picky",
        "headrace_kernels.reference.norm",
        invariant_on=(),
        declines=lambda facts: None if facts.dtype == torch.bfloat16 else "needs bfloat16",
    )
    candidates = {**dispatch.CANDIDATES, "norm": (candidate, *dispatch.CANDIDATES["norm"])}
    monkeypatch.setattr(dispatch, "CANDIDATES", candidates)
    return candidate


def test_the_reference_runs_everywhere() -> None:
    reference = dict.fromkeys(dispatch.OPS, "reference")
    kernels = dispatch.choose(FACTS, reference)
    assert dict(kernels.names) == reference
    assert kernels.batch_invariant
    on_a_gpu = dispatch.choose(dataclasses.replace(FACTS, device="cuda"))
    assert dict(on_a_gpu.names) == reference
    assert not on_a_gpu.batch_invariant
    assert kernels.paged_attention is attention.paged_attention
    assert kernels.add_rms_norm is norm.add_rms_norm
    assert kernels.silu_and_mul is activation.silu_and_mul


def test_every_op_of_every_stem_is_in_the_set() -> None:
    ops = {name for names in dispatch.OPS.values() for name in names}
    fields = {field.name for field in dataclasses.fields(KernelSet)}
    assert fields == ops | {"names", "batch_invariant"}


def test_the_first_that_does_not_decline_is_taken(picky: Candidate) -> None:
    assert dict(dispatch.choose(FACTS).names)["norm"] == "reference"
    kernels = dispatch.choose(dataclasses.replace(FACTS, dtype=torch.bfloat16))
    assert dict(kernels.names)["norm"] == "picky"
    assert not kernels.batch_invariant


def test_an_explicit_choice_is_honoured_or_refused(picky: Candidate) -> None:
    bf16 = dataclasses.replace(FACTS, dtype=torch.bfloat16)
    assert dict(dispatch.choose(bf16, {"norm": "reference"}).names)["norm"] == "reference"
    with pytest.raises(
        KernelUnavailableError,
        match=r"norm kernel 'picky' cannot run here \(picky: needs bfloat16\).*picky, reference",
    ):
        dispatch.choose(FACTS, {"norm": "picky"})
    with pytest.raises(KernelUnavailableError, match="no kernel 'fast'; it has picky, reference"):
        dispatch.choose(FACTS, {"norm": "fast"})
    with pytest.raises(KernelUnavailableError, match="no op 'nrom'; the ops are norm, rope"):
        dispatch.choose(FACTS, {"nrom": "reference"})


def test_deterministic_takes_only_kernels_whose_rows_do_not_depend_on_the_batch(
    picky: Candidate,
) -> None:
    facts = dataclasses.replace(FACTS, dtype=torch.bfloat16, deterministic=True)
    kernels = dispatch.choose(facts)
    assert dict(kernels.names)["norm"] == "reference"
    assert kernels.batch_invariant
    with pytest.raises(KernelUnavailableError, match="picky: what a request gets depends on"):
        dispatch.choose(facts, {"norm": "picky"})
    reasons = {(d.stem, d.candidate): d.reason for d in dispatch.explain(facts)}
    assert reasons["norm", "picky"].startswith("what a request gets depends on the others")


def test_an_unverified_kernel_runs_only_if_it_is_asked_for(
    plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate(
        "new",
        "headrace_kernels.reference.norm",
        invariant_on=(),
        declines=lambda facts: None,
        unverified=lambda facts: f"never run on {facts.arch}",
    )
    candidates = {**dispatch.CANDIDATES, "norm": (candidate, *dispatch.CANDIDATES["norm"])}
    monkeypatch.setattr(dispatch, "CANDIDATES", candidates)
    assert dict(dispatch.choose(FACTS).names)["norm"] == "reference"
    assert dict(dispatch.choose(FACTS, {"norm": "new"}).names)["norm"] == "new"
    reasons = {(d.stem, d.candidate): d.reason for d in dispatch.explain(FACTS)}
    assert reasons["norm", "new"] == "never run on x86_64"


def test_a_kernel_counts_as_checked_while_its_sources_are_those_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "headrace_kernels"
    folder = package / "triton"
    folder.mkdir(parents=True)
    (folder / "norm.py").write_text("from headrace_kernels.triton.rows import sum_of\n")
    (folder / "rows.py").write_text("sum_of = sum\n")
    (folder / "other.py").write_text("")
    monkeypatch.setattr(verified, "PACKAGE", package)
    monkeypatch.setattr(verified, "RECORD", tmp_path / "verified.json")
    monkeypatch.setattr(verified, "_record", functools.cache(verified._record.__wrapped__))
    assert verified.reason_unverified("triton", "norm", "sm_90") == "never run on sm_90"
    verified.record_verified("triton", "norm", "sm_90")
    assert verified.reason_unverified("triton", "norm", "sm_90") is None
    assert verified.reason_unverified("triton", "norm", "sm_80") == "never run on sm_80"
    (folder / "other.py").write_text("# of no matter\n")
    assert verified.reason_unverified("triton", "norm", "sm_90") is None
    (folder / "rows.py").write_text("sum_of = max\n")
    reason = verified.reason_unverified("triton", "norm", "sm_90")
    assert reason == "changed since it was checked on sm_90"


def test_no_candidate_left(plain: None) -> None:
    with pytest.raises(
        KernelUnavailableError, match=r"No attention kernel can run here \(reference: page size 48"
    ):
        dispatch.choose(dataclasses.replace(FACTS, page_size=48))


def test_explain_says_why(picky: Candidate) -> None:
    reasons = {
        (d.stem, d.candidate): (d.chosen, d.reason)
        for d in dispatch.explain(FACTS, {"rope": "reference"})
    }
    assert reasons["norm", "picky"] == (False, "needs bfloat16")
    assert reasons["norm", "reference"] == (True, "first that can run")
    assert reasons["rope", "reference"] == (True, "asked for")
    bf16 = dataclasses.replace(FACTS, dtype=torch.bfloat16)
    passed_over = next(d for d in dispatch.explain(bf16) if d.candidate == "reference")
    assert passed_over.reason == "picky was chosen"
