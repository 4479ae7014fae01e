"""The C++ kernels of `headrace_kernels._C`: loads them, registers their fakes, sets their threads.

It knows no kernel: cpu/<stem>.py call the ops and dispatch.py chooses among them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Literal

import torch

CpuIsa = Literal["scalar", "avx2", "avx512"]


@functools.cache
def unavailable() -> str | None:
    """Why there are no native kernels, or None if they are loaded; the first call loads them."""
    try:
        importlib.import_module("headrace_kernels._C")
    except ModuleNotFoundError:
        return "not built (remedy: install a C++ compiler, then `python setup.py build_ext -i`)"
    except ImportError as error:
        return f"cannot be loaded: {error}"
    _register_fakes()
    return None


def missing(op: str) -> str | None:
    """Why torch.ops.headrace has no `op`, or None if it has."""
    reason = unavailable()
    if reason is None and not hasattr(torch.ops.headrace, op):
        return f"not built: the native kernels lack {op}"
    return reason


def num_threads() -> int:
    """Threads of the native kernels' pool; 1 without them."""
    return int(torch.ops.headrace.num_threads()) if unavailable() is None else 1


def set_num_threads(threads: int) -> None:
    """Size the pool of the native kernels, if there are any."""
    if unavailable() is None:
        torch.ops.headrace.set_num_threads(threads)


def cpu_isa() -> CpuIsa | None:
    """The instruction set that the CPU kernels use; None without them."""
    return torch.ops.headrace.cpu_isa() if unavailable() is None else None


def set_cpu_isa(isa: str) -> None:
    """Use the CPU kernels of this CpuIsa. Raises RuntimeError for one that this CPU lacks."""
    torch.ops.headrace.set_cpu_isa(isa)


def _register_fakes() -> None:
    """Native ops write into their arguments and return nothing: so does each fake."""
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    for name in sorted(names):
        namespace, _, op = name.partition("::")
        if namespace != "headrace":
            continue
        schema = getattr(torch.ops.headrace, op).default._schema
        if not schema.returns:
            torch.library.register_fake(name, lambda *args, **kwargs: None)
