"""The sampling parameters of a step's rows, cut out of the running requests' columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.engine.request import IntArray, LongArray, RunningRequests
from headrace.engine.sampler import SamplingBatch
from headrace.engine.token_masks import MaskArray, allows, without


def sampling_columns(
    running: RunningRequests, rows: LongArray, positions: IntArray
) -> SamplingBatch:
    """What the sampler needs for `rows`, whose new tokens get `positions`.

    Python touches only rows with more than columns. The tokens before a position must be known
    for penalized rows, and those with banned sequences: the scheduler waits for them.
    """
    return SamplingBatch(
        temperature=running.temperature[rows],
        top_k=running.top_k[rows],
        top_p=running.top_p[rows],
        min_p=running.min_p[rows],
        presence=running.presence_penalty[rows],
        frequency=running.frequency_penalty[rows],
        repetition=running.repetition_penalty[rows],
        seed=running.seed[rows],
        position=positions.astype(np.int64),
        num_logprobs=running.num_logprobs[rows],
        **_rarities(running, rows, positions),
    )


def _rarities(
    running: RunningRequests, rows: LongArray, positions: IntArray
) -> dict[str, dict[int, Any]]:
    """The SamplingBatch fields that only few rows have, by index into `rows`."""
    masks = _masks(running, rows, positions)
    banned = {}
    if running.with_min_tokens:
        for index in np.flatnonzero(positions < running.min_total_tokens[rows]).tolist():
            if index in masks:
                continue
            stop_token_ids = running.request(int(rows[index])).stop_token_ids
            banned[index] = np.fromiter(stop_token_ids, np.int64)
    if not (running.penalized or running.biased or running.restricted):
        return {"banned": banned, "masks": masks}
    index_of = {row: index for index, row in enumerate(rows.tolist())}
    penalized = {}
    for row in running.penalized & index_of.keys():
        prompt_end, end = int(running.num_prompt_tokens[row]), int(positions[index_of[row]])
        tokens = running.token_ids[row]
        penalized[index_of[row]] = (tokens[:prompt_end], tokens[prompt_end:end])
    logit_bias = {}
    for row in running.biased & index_of.keys():
        bias = running.request(row).sampling.logit_bias or {}
        logit_bias[index_of[row]] = (
            np.fromiter(bias.keys(), np.int64, len(bias)),
            np.fromiter(bias.values(), np.float32, len(bias)),
        )
    allowed = {}
    for row in running.restricted & index_of.keys():
        index, request = index_of[row], running.request(row)
        if request.allowed_token_ids is not None:
            allowed[index] = request.allowed_token_ids
        if request.banned is not None:
            output = running.token_ids[row, running.num_prompt_tokens[row] : positions[index]]
            if len(ids := request.banned.next_to(output)):
                banned[index] = np.concatenate((banned[index], ids)) if index in banned else ids
        if request.thinking_end is not None:
            output = running.token_ids[row, running.num_prompt_tokens[row] : positions[index]]
            forced = request.thinking_end.next_to(output)
            # A grammar has half a character finished before.
            if forced is not None and (index not in masks or allows(masks[index], int(forced[0]))):
                allowed[index] = forced
                banned.pop(index, None)
    return {
        "penalized": penalized,
        "logit_bias": logit_bias,
        "allowed": allowed,
        "banned": banned,
        "masks": masks,
    }


def _masks(running: RunningRequests, rows: LongArray, positions: IntArray) -> dict[int, MaskArray]:
    """By index into `rows`, what grammars allow. An end token that the request does not want, or
    not yet, is left out where something else is allowed."""
    masks: dict[int, MaskArray] = {}
    if not running.constrained:
        return masks
    for index, row in enumerate(rows.tolist()):
        mask = running.token_masks.of(row)
        if mask is None:
            continue
        request = running.request(row)
        if request.sampling.ignore_eos:
            mask = without(mask, running.eos_token_ids)
        if positions[index] < running.min_total_tokens[row]:
            mask = without(mask, request.stop_token_ids)
        masks[index] = mask
    return masks
