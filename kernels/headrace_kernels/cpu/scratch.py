"""Memory that the C++ kernels work in: they allocate none themselves."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SMALLEST_BYTES = 4096

_of_thread = threading.local()


def scratch(op: str, nbytes: int) -> Tensor:
    """uint8 [nbytes] for this op on this thread, the same at every call.

    Memory that becomes too small is kept, since recorded steps may point to it; sizes double, so
    that is less than is in use.
    """
    memory: dict[str, list[Tensor]] = _of_thread.__dict__.setdefault("memory", {})
    sizes = memory.setdefault(op, [])
    if not sizes or len(sizes[-1]) < nbytes:
        capacity = max(SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())
        sizes.append(torch.empty(capacity, dtype=torch.uint8))
    return sizes[-1][:nbytes]
