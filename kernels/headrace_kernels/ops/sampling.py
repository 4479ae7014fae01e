"""The public sampling ops: what they take, what they promise, and the checks.

Knows nothing of requests; `headrace.engine.sampler` turns request columns into these calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace_kernels.dispatch import kernels_for
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.reference import sampling as reference

MAX_TOP_LOGPROBS = 20


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    kernels: KernelSet | None = None,
) -> Tensor:
    """Draw one token a row from softmax(logits / temperature) after top_k, then top_p, then min_p.

    The draw is exact (the Gumbel-max trick): the largest of scaled logit + noise among the tokens
    that survive, where the noise of a token is a function of (seed, position, token id) only. A
    row's token depends on nothing but the row.

    Args:
        logits: [R, V] float32; not modified.
        temperature: [R] float32; 0 takes the largest logit and ignores the other columns.
        top_k: [R] int32, the number of tokens that survive; 0 is no limit. Of equal logits the
            lower token ids survive.
        top_p: [R] float32 in (0, 1]: the smallest set of most likely tokens with at least this
            share of what top_k left (nucleus sampling, arXiv 1904.09751). Shares are counted in
            whole numbers of 2^-34 of the likeliest token's, so that every kernel agrees on them.
        min_p: [R] float32 in [0, 1]: tokens at least this likely relative to the likeliest one
            survive (arXiv 2407.01082).
        seeds, positions: [R] int64, the identity of the noise.
        kernels: a model's own; None is the automatic choice.

    All columns are on the logits' device, so that nothing has to wait for it.

    Returns:
        [R] int64 on the logits' device. Of equal scores the lowest token id is taken. A row
        without a distribution (a NaN or +inf in it, or nothing but -inf) gives -1.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    _check_logits(logits)
    for name, column, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        if (
            column.shape != logits.shape[:1]
            or column.dtype != dtype
            or column.device != logits.device
        ):
            raise ValueError(
                f"{name} must be [{len(logits)}] {dtype} on {logits.device}, as the logits are, "
                f"got {list(column.shape)} {column.dtype} on {column.device}."
            )
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    (kernels or kernels_for(logits)).sample_tokens(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        out=out,
    )
    return out


def apply_penalties(
    logits: Tensor,
    *,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """Penalize N (row, token) pairs, each listed once. Modifies `logits` [R, V] float32 in place.

    A positive logit is divided and another multiplied by `repetition` (CTRL, arXiv 1909.05858);
    then `frequency * output_counts + presence * (output_counts > 0)` is subtracted (OpenAI).

    Args:
        rows, token_ids: [N] int64. List the tokens of prompt and output; those of the prompt alone
            have an output count of 0.
        output_counts: [N] int64, how often the token stands in the output.
        presence, frequency, repetition: [N] float32, of the pair's row.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check_logits(logits)
    columns = (token_ids, output_counts, presence, frequency, repetition)
    if any(column.shape != rows.shape for column in columns) or rows.ndim != 1:
        raise ValueError("rows, token_ids, output_counts and the penalties must share a shape [N].")
    reference.apply_penalties(
        logits,
        rows=rows,
        token_ids=token_ids,
        output_counts=output_counts,
        presence=presence,
        frequency=frequency,
        repetition=repetition,
    )


def token_logprobs(
    logits: Tensor, token_ids: Tensor, k: int, kernels: KernelSet | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (natural) of one given token a row, and of the k most likely ones.

    Args:
        logits: [N, V] float32, as the model made them.
        token_ids: [N] int64, in the vocabulary.
        k: 0 to 20.
        kernels: a model's own; None is the automatic choice.

    Returns:
        logprobs [N] float32, top_ids [N, min(k, V)] int64 (best first, the lower id first of equal
        logits) and top_logprobs, likewise, float32. Of a row with NaN or +inf, or nothing but -inf,
        the log-probabilities are NaN and the top_ids are tokens that mean nothing.

    Raises:
        ValueError: a wrong shape or dtype, or k out of range.
    """
    _check_logits(logits)
    if token_ids.shape != logits.shape[:1] or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids must be [{len(logits)}] torch.int64, "
            f"got {list(token_ids.shape)} {token_ids.dtype}."
        )
    if not 0 <= k <= MAX_TOP_LOGPROBS:
        raise ValueError(f"k must be in [0, {MAX_TOP_LOGPROBS}], got {k}.")
    shape = (len(logits), min(k, logits.shape[1]))
    logprobs = logits.new_empty(len(logits))
    top_ids, top_logprobs = token_ids.new_empty(shape), logits.new_empty(shape)
    (kernels or kernels_for(logits)).token_logprobs(
        logits, token_ids, logprobs, top_ids, top_logprobs
    )
    return logprobs, top_ids, top_logprobs


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must be [rows, vocabulary] torch.float32, "
            f"got {list(logits.shape)} {logits.dtype}."
        )
