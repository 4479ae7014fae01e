"""From a batch's logits and its requests' sampling columns to token ids and log-probabilities.

Owns the translation of per-request extras (penalties, logit_bias, banned tokens) into batched ops,
and sampling on a CPU; cuda_sampling.py is what a GPU does instead. Knows no request objects and no
scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace.engine.token_masks import mask_logits
from headrace_kernels.kernel_set import KernelSet
from headrace_kernels.ops import sampling as ops

FloatColumn = npt.NDArray[np.float32]
IntColumn = npt.NDArray[np.int32]
LongColumn = npt.NDArray[np.int64]
TokenIds = npt.NDArray[np.integer]
Upload = Callable[[np.ndarray], Tensor]

NO_TOKEN = -1
"""Stands for the token of a row whose logits are no distribution."""


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How to sample R rows: one numpy column a parameter, and mappings for the few rows with more.

    Token ids must lie in the vocabulary.
    """

    temperature: FloatColumn
    """0 is greedy."""
    top_k: IntColumn
    """0 is no limit."""
    top_p: FloatColumn
    min_p: FloatColumn
    presence: FloatColumn
    frequency: FloatColumn
    repetition: FloatColumn
    seed: LongColumn
    position: LongColumn
    """The position in the sequence that the new token will have."""
    num_logprobs: IntColumn
    """-1: none; 0: of the sampled token; k: also of the k most likely tokens, at most 20."""
    penalized: Mapping[int, tuple[TokenIds, TokenIds]] = field(default_factory=dict)
    """Row -> (prompt ids, output ids). The penalties of other rows are ignored."""
    logit_bias: Mapping[int, tuple[TokenIds, FloatColumn]] = field(default_factory=dict)
    """Row -> (distinct ids, what to add to their logits)."""
    allowed: Mapping[int, TokenIds] = field(default_factory=dict)
    """Row -> the only ids that can be sampled."""
    banned: Mapping[int, TokenIds] = field(default_factory=dict)
    """Row -> ids that cannot be sampled now: end tokens before min_tokens, ends of bad words."""
    masks: Mapping[int, IntColumn] = field(default_factory=dict)
    """Row -> [ceil(V / 32)] what can be sampled: bit i of word w stands for token 32 w + i."""

    def __len__(self) -> int:
        return len(self.temperature)


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was sampled, on the host."""

    token_ids: LongColumn
    """[R]; NO_TOKEN for a row with NaN or +inf logits, or whose tokens are all banned."""
    logprobs: Mapping[int, tuple[float, list[int], list[float]]]
    """Row -> (the token's log-probability, the most likely tokens best first, theirs), for the
    rows that asked and have a token; of the model's own distribution, before all else."""


class Sampler:
    """On a CPU. Stateless: the same batch gives the same tokens, however it is composed."""

    def __init__(self, kernels: KernelSet) -> None:
        self._kernels = kernels

    def sample(self, logits: Tensor, batch: SamplingBatch, *, reuse: bool = False) -> SampledTokens:
        """Sample one token for each row of logits [R, V] float32. They are not modified, or may be
        with `reuse`.

        A row's result depends on that row only. Raises ValueError when the shapes disagree.
        """
        reuse = reuse and not (batch.num_logprobs >= 0).any()
        tokens = ops.sample_tokens(
            adjusted(logits, batch, torch.from_numpy, reuse=reuse),
            temperature=torch.from_numpy(batch.temperature),
            top_k=torch.from_numpy(batch.top_k),
            top_p=torch.from_numpy(batch.top_p),
            min_p=torch.from_numpy(batch.min_p),
            seeds=torch.from_numpy(batch.seed),
            positions=torch.from_numpy(batch.position),
            kernels=self._kernels,
        )
        token_ids = tokens.numpy()
        return SampledTokens(token_ids, self._logprobs(logits, token_ids, batch.num_logprobs))

    def _logprobs(
        self, logits: Tensor, token_ids: LongColumn, num_logprobs: IntColumn
    ) -> dict[int, tuple[float, list[int], list[float]]]:
        rows = np.flatnonzero((num_logprobs >= 0) & (token_ids != NO_TOKEN))
        if len(rows) == 0:
            return {}
        wanted = num_logprobs[rows]
        chosen, top_ids, top = ops.token_logprobs(
            logits[torch.from_numpy(rows)],
            torch.from_numpy(token_ids[rows]),
            int(wanted.max()),
            self._kernels,
        )
        columns = zip(
            rows.tolist(),
            wanted.tolist(),
            chosen.tolist(),
            top_ids.tolist(),
            top.tolist(),
            strict=True,
        )
        return {row: (logprob, ids[:k], values[:k]) for row, k, logprob, ids, values in columns}


def adjusted(
    logits: Tensor, batch: SamplingBatch, upload: Upload, *, reuse: bool = False
) -> Tensor:
    """The logits after penalties, then bias, then what is not allowed or banned: a copy, if any
    row has one of them, or the same memory with `reuse`.

    `upload` brings an array to their device.
    """
    if not (batch.penalized or batch.logit_bias or batch.allowed or batch.banned or batch.masks):
        return logits
    logits = logits if reuse else logits.clone()
    if batch.penalized:
        _penalize(logits, batch, upload)
    if batch.logit_bias:
        rows, ids = _pairs({row: ids for row, (ids, _) in batch.logit_bias.items()})
        values = np.concatenate([values for _, values in batch.logit_bias.values()])
        logits[upload(rows), upload(ids)] += upload(values)
    if batch.allowed:
        # Added, so that logits that are no numbers stay that.
        mask = torch.full((len(batch.allowed), logits.shape[1]), -torch.inf, device=logits.device)
        rows, ids = _pairs(dict(enumerate(batch.allowed.values())))
        mask[upload(rows), upload(ids)] = 0
        logits[upload(np.fromiter(batch.allowed, np.int64))] += mask
    if batch.banned:
        rows, ids = _pairs(batch.banned)
        logits[upload(rows), upload(ids)] = -torch.inf
    if batch.masks:
        _mask(logits, batch.masks, upload)
    return logits


def _mask(logits: Tensor, masks: Mapping[int, IntColumn], upload: Upload) -> None:
    """-inf where a mask has no bit."""
    if logits.device.type != "cpu":
        mask_on_device(logits, masks, upload)
        return
    for row, mask in masks.items():
        mask_logits(logits[row].numpy(), mask)


def mask_on_device(logits: Tensor, masks: Mapping[int, IntColumn], upload: Upload) -> None:
    """The same, with the masks unpacked where the logits are."""
    packed = upload(np.stack(list(masks.values())))
    bits = (packed.unsqueeze(2) >> torch.arange(32, device=logits.device)) & 1
    banned = bits.flatten(1)[:, : logits.shape[1]] == 0
    rows = upload(np.fromiter(masks, np.int64))
    logits[rows] = logits[rows].masked_fill(banned, -torch.inf)


def _penalize(logits: Tensor, batch: SamplingBatch, upload: Upload) -> None:
    seen: dict[int, LongColumn] = {}
    counts: list[LongColumn] = []
    for row, (prompt_ids, output_ids) in batch.penalized.items():
        ids, inverse = np.unique(np.concatenate((output_ids, prompt_ids)), return_inverse=True)
        seen[row] = ids
        counts.append(np.bincount(inverse[: len(output_ids)], minlength=len(ids)))
    rows, ids = _pairs(seen)
    ops.apply_penalties(
        logits,
        rows=upload(rows),
        token_ids=upload(ids),
        output_counts=upload(np.concatenate(counts)),
        presence=upload(batch.presence[rows]),
        frequency=upload(batch.frequency[rows]),
        repetition=upload(batch.repetition[rows]),
    )


def _pairs(ids_of_row: Mapping[int, TokenIds]) -> tuple[LongColumn, LongColumn]:
    """One flat (row, token id) pair for each id."""
    lengths = [len(ids) for ids in ids_of_row.values()]
    rows = np.repeat(np.fromiter(ids_of_row, np.int64, len(lengths)), lengths)
    return rows, np.concatenate(list(ids_of_row.values())).astype(np.int64)
