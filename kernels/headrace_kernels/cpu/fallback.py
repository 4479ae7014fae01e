"""What becomes of a call whose tensors a C++ kernel refuses: the reference computes it.

The ops check their arguments in C++ before they write anything; a check in Python as well would
cost as much as the call. What the reference refuses too, it refuses with its own error.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)

FLOATS = frozenset((torch.float32, torch.bfloat16))
"""What the kernels read and write."""


@functools.lru_cache(maxsize=64)
def log_once(op: str, refusal: str) -> None:
    """Say that a call of `op` goes to the slower reference, and why, when that is new."""
    logger.info("%s goes to the reference: %s", op, refusal)
