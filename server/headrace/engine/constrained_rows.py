"""What a step does for running rows whose output follows a grammar."""

from __future__ import annotations

import numpy as np

from headrace.engine.request import LongArray, RunningRequests


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
    stopped: np.ndarray,
    failed: np.ndarray,
) -> None:
    """File each constrained row's new token with its grammar; `stopped` and `failed`, [S] bool, are
    set for those that cannot go on."""
    for index, row in enumerate(rows.tolist()):
        if row not in running.constrained or failed[index]:
            continue
        constraint = running.request(row).constraint
        assert constraint is not None
        if not stopped[index]:
            constraint.accept((int(tokens[index]),))
            stopped[index] = constraint.ended
        if constraint.error:
            failed[index] = True
            running.num_known_tokens[row] -= 1
