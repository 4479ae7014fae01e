"""Which implementation of each op runs here: candidates as data, and why each was or was not taken.

It knows names and capabilities; implementations are imported when they are chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace_kernels import native, verified
from headrace_kernels.cuda import extension
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.kv_format import head_dim_of

logger = logging.getLogger(__name__)

OPS = {
    "norm": ("rms_norm", "add_rms_norm"),
    "rope": ("rope_and_write_kv",),
    "activation": ("silu_and_mul",),
    "attention": ("paged_attention",),
    "embedding": ("embedding",),
    "linear": ("linear",),
    "quantization": ("quantize_rows",),
    "scaled_linear": ("scaled_linear",),
    "quantized_linear": ("quantized_linear", "quantized_embedding"),
    "sampling": ("sample_tokens", "token_logprobs"),
    "kv_copy": ("copy_blocks",),
    "step_inputs": ("put", "token_inputs", "sampling_inputs"),
    "encoder": ("add_layer_norm", "mlp_activation", "bidirectional_attention"),
}
"""The functions of each stem."""

CUBLAS_STEMS = ("linear", "scaled_linear", "quantized_linear")
"""Stems that have a candidate for many tokens by torch's matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFacts:
    """What a candidate may ask before it agrees to run."""

    device: str
    """torch's device type: cpu, cuda."""
    arch: str
    """sm_90 and the like on a GPU; the machine's name on a CPU."""
    dtype: torch.dtype
    """Of weights, GEMM inputs and KV."""
    head_dim: int
    page_size: int
    deterministic: bool = False
    """Only candidates are wanted whose rows do not depend on the batch around them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation of a stem; `module` has a function for each name in OPS[stem]."""

    name: str
    module: str
    invariant_on: tuple[str, ...]
    """Device types on which a row's result depends on that row only, to the bit."""
    declines: Callable[[KernelFacts], str | None]
    """The reason why it cannot run on these facts, or None if it can."""
    unverified: Callable[[KernelFacts], str | None] = lambda facts: None
    """The reason why it runs only if it is asked for by name, or None."""

    def refuses(self, facts: KernelFacts) -> str | None:
        """Why it is not taken, even if it is asked for by name."""
        if facts.deterministic and facts.device not in self.invariant_on:
            return "what a request gets depends on the others in its batch"
        return self.declines(facts)


@dataclass(frozen=True, slots=True)
class Decision:
    """A line of `headrace kernels`: a candidate and what became of it."""

    stem: str
    candidate: str
    chosen: bool
    reason: str


class KernelUnavailableError(ValueError):
    """An explicit choice cannot be honoured; the message lists what there is."""


def _never(facts: KernelFacts) -> str | None:
    return None


def _needs_small_pages(facts: KernelFacts) -> str | None:
    if 64 % facts.page_size == 0:
        return None
    return f"page size {facts.page_size} does not divide its tile of 64 tokens"


def _lacks_native_cpu(stem: str, facts: KernelFacts) -> str | None:
    if facts.device != "cpu":
        return "runs on a CPU only"
    missing = (native.missing(op) for op in OPS[stem])
    return next((reason for reason in missing if reason is not None), None)


def _lacks_triton(stem: str, facts: KernelFacts) -> str | None:
    if facts.device != "cuda" and not interprets_triton():
        return "runs on a GPU only"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _lacks_cublas(stem: str, facts: KernelFacts) -> str | None:
    """Few tokens go to Triton's kernels."""
    return "runs on a GPU only" if facts.device != "cuda" else _lacks_triton(stem, facts)


def _lacks_cuda(stem: str, facts: KernelFacts) -> str | None:
    return "runs on a GPU only" if facts.device != "cuda" else extension.unavailable()


def interprets_triton() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors; it asks when it decorates them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _candidate(
    name: str,
    stem: str,
    lacks: Callable[[str, KernelFacts], str | None],
    *,
    invariant_on: tuple[str, ...],
) -> Candidate:
    """Of headrace_kernels/<name>/<stem>.py, which also has `declines(facts)`.

    `lacks`: what all modules of the folder need and what is not here.
    """
    module = f"headrace_kernels.{name}.{stem}"

    def declines(facts: KernelFacts) -> str | None:
        if (reason := lacks(stem, facts)) is not None:
            return reason
        if importlib.util.find_spec(module) is None:
            return "there is none"
        reason = importlib.import_module(module).declines(facts)
        assert reason is None or isinstance(reason, str)
        return reason

    def unverified(facts: KernelFacts) -> str | None:
        return None if name == "cpu" else verified.reason_unverified(name, stem, facts.arch)

    return Candidate(name, module, invariant_on, declines, unverified)


def _candidates(stem: str) -> Iterator[Candidate]:
    yield _candidate("cpu", stem, _lacks_native_cpu, invariant_on=("cpu",))
    if stem in CUBLAS_STEMS:
        yield _candidate("cublas", stem, _lacks_cublas, invariant_on=())
    yield _candidate("triton", stem, _lacks_triton, invariant_on=("cpu", "cuda"))
    # Behind Triton's until measurements say otherwise: it is asked for by name.
    invariant_on = () if stem == "attention" else ("cuda",)
    yield _candidate("cuda", stem, _lacks_cuda, invariant_on=invariant_on)
    yield Candidate(
        "reference",
        f"headrace_kernels.reference.{stem}",
        # A copy has no order of sums; encoders compute each request by itself.
        invariant_on=("cpu", "cuda") if stem in ("kv_copy", "encoder") else ("cpu",),
        declines=_needs_small_pages if stem == "attention" else _never,
    )


CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {stem: tuple(_candidates(stem)) for stem in OPS}
"""Candidates of each stem, best first."""


def choose(facts: KernelFacts, explicit: Mapping[str, str] | None = None) -> KernelSet:
    """The first candidate of each stem that does not decline, or the one that `explicit` names.

    Raises KernelUnavailableError if an explicit choice is unknown or declines, or no candidate is
    left.
    """
    explicit = explicit or {}
    for stem in explicit.keys() - OPS.keys():
        raise KernelUnavailableError(f"There is no op {stem!r}; the ops are {', '.join(OPS)}.")
    functions: dict[str, Callable[..., Any]] = {}
    chosen: dict[str, Candidate] = {}
    for stem, names in OPS.items():
        candidate = chosen[stem] = _choose_one(stem, facts, explicit.get(stem))
        module = importlib.import_module(candidate.module)
        functions |= {name: getattr(module, name) for name in names}
    logger.debug("kernels: %s", {stem: candidate.name for stem, candidate in chosen.items()})
    return KernelSet(
        **functions,
        names=tuple((stem, candidate.name) for stem, candidate in chosen.items()),
        batch_invariant=all(
            facts.device in candidate.invariant_on for candidate in chosen.values()
        ),
    )


def explain(facts: KernelFacts, explicit: Mapping[str, str] | None = None) -> list[Decision]:
    """Every candidate of every stem: chosen, passed over, or why it declines."""
    explicit = explicit or {}
    decisions = []
    for stem, candidates in CANDIDATES.items():
        chosen = _choose_one(stem, facts, explicit.get(stem))
        for candidate in candidates:
            if candidate is chosen:
                reason = "asked for" if stem in explicit else "first that can run"
            else:
                reason = (
                    candidate.refuses(facts)
                    or candidate.unverified(facts)
                    or f"{chosen.name} was chosen"
                )
            decisions.append(Decision(stem, candidate.name, candidate is chosen, reason))
    return decisions


def kernels_for(x: Tensor, kv_cache: Tensor | None = None) -> KernelSet:
    """The automatic choice for these tensors, for the public ops; a model holds its own set."""
    page_size = 1 if kv_cache is None else kv_cache.shape[3]
    head_dim = x.shape[-1] if kv_cache is None else head_dim_of(kv_cache)
    return _automatic(
        KernelFacts(
            device=x.device.type,
            arch=device_arch(x.device),
            dtype=x.dtype,
            head_dim=head_dim,
            page_size=page_size,
        )
    )


def device_arch(device: torch.device) -> str:
    """The `arch` of KernelFacts for a device of this machine."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return platform.machine()


@functools.lru_cache(maxsize=64)
def _automatic(facts: KernelFacts) -> KernelSet:
    return choose(facts)


def _choose_one(stem: str, facts: KernelFacts, name: str | None) -> Candidate:
    declined = []
    for candidate in CANDIDATES[stem]:
        if name is not None and candidate.name != name:
            continue
        reason = candidate.refuses(facts)
        if reason is None and name is None:
            reason = candidate.unverified(facts)
        if reason is None:
            return candidate
        declined.append(f"{candidate.name}: {reason}")
    known = ", ".join(candidate.name for candidate in CANDIDATES[stem])
    if name is not None and not declined:
        raise KernelUnavailableError(f"{stem} has no kernel {name!r}; it has {known}.")
    what = f"The {stem} kernel {name!r}" if name is not None else f"No {stem} kernel"
    verb = "cannot run" if name is not None else "can run"
    raise KernelUnavailableError(
        f"{what} {verb} here ({'; '.join(declined)}). The kernels of {stem} are {known}."
    )
