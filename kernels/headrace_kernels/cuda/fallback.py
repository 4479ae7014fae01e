"""What takes the calls that a CUDA kernel refuses: Triton's kernel of the op, or the reference."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


@functools.cache
def other(stem: str, op: str) -> Callable[..., Any]:
    """The function `op` of triton/<stem>.py, where it and Triton are there, or of the reference."""
    name = f"headrace_kernels.triton.{stem}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(name) is None:
        name = f"headrace_kernels.reference.{stem}"
    function: Callable[..., Any] = getattr(importlib.import_module(name), op)
    return function
