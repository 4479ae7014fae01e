"""The CUDA C++ kernels of `headrace_kernels._CUDA`: loads them and registers their fakes.

It knows no kernel: cuda/<stem>.py call the ops and dispatch.py chooses among them.
"""

from __future__ import annotations

import functools
import importlib

import torch


@functools.cache
def unavailable() -> str | None:
    """Why there are no CUDA kernels, or None if they are loaded; the first call loads them."""
    try:
        importlib.import_module("headrace_kernels._CUDA")
    except ModuleNotFoundError:
        return "not built (remedy: with nvcc and a CUDA build of torch, `setup.py build_ext -i`)"
    except ImportError as error:
        return f"cannot be loaded: {error}"
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "headrace_cuda":
            schema = getattr(torch.ops.headrace_cuda, op.partition(".")[0]).default._schema
            # Those that write into their arguments return nothing, and so does each fake.
            if not schema.returns:
                torch.library.register_fake(name, lambda *args, **kwargs: None)
    return None


def sources() -> str:
    """What the kernels were built from (nvcc.digest); empty without them."""
    return str(torch.ops.headrace_cuda.sources()) if unavailable() is None else ""
