"""What a step does for running rows whose output follows a grammar."""

from __future__ import annotations

import numpy as np

from headrace.engine.request import LongArray, RunningRequests

MIN_JUMP = 2
"""Tokens. A step that appends some is not recorded: for one alone, which is left to its mask, that
costs more than it saves. The same for every batch: tokens must not depend on it."""


def start_masks(running: RunningRequests, rows: LongArray) -> None:
    """Have the masks found of those of `rows`, about to get their next tokens, with a grammar."""
    if not running.constrained:
        return
    constraints = {}
    for row in rows.tolist():
        if (constraint := running.request(row).constraint) is not None:
            constraints[row] = constraint
    running.token_masks.start(constraints)


def follow_grammars(
    running: RunningRequests,
    rows: LongArray,
    tokens: LongArray,
    *,
    stopped: np.ndarray,
    full: np.ndarray,
    failed: np.ndarray,
) -> dict[int, list[int]]:
    """File each constrained row's new token with its grammar, and append what must follow it: the
    next step computes that as it does a prompt.

    `stopped`, `full` and `failed`, [S] bool, are set for rows that end so. Returns the tokens of
    rows that got more, or fewer, than their new one.
    """
    several: dict[int, list[int]] = {}
    for index, row in enumerate(rows.tolist()):
        if row not in running.constrained or failed[index]:
            continue
        request = running.request(row)
        constraint = request.constraint
        assert constraint is not None
        output, request.undelivered = [*request.undelivered, int(tokens[index])], []
        if not stopped[index]:
            constraint.accept(output[-1:])
            if may_jump(running, row):
                room = int(running.max_total_tokens[row] - running.num_tokens[row])
                forced = constraint.force(room, at_least=MIN_JUMP)
                append(running, row, forced)
                output += forced
            stopped[index] = constraint.ended
            full[index] = running.num_known_tokens[row] >= running.max_total_tokens[row]
        if constraint.error:
            failed[index] = True
            running.num_known_tokens[row] -= 1
        elif len(output) > 1:
            several[row] = output
    return several


def may_jump(running: RunningRequests, row: int) -> bool:
    """Whether tokens may be appended that are not sampled: they have no log-probabilities, and
    nobody looks for stop tokens among them."""
    return running.num_logprobs[row] < 0 and row not in running.with_stop_tokens


def append(running: RunningRequests, row: int, token_ids: list[int]) -> None:
    """Put known tokens behind those of a row that has no step in flight."""
    begin = int(running.num_tokens[row])
    assert begin == running.num_known_tokens[row], "a step in flight samples there"
    end = begin + len(token_ids)
    running.token_ids[row, begin:end] = token_ids
    running.num_tokens[row] = running.num_known_tokens[row] = end
