"""cuda_host.cpp as a library: the CUDA kernels on CPU tensors, as simt_host.h runs them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "csrc" / "include"
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
"""By the code that cuda_host.cpp knows them by."""
SCHEDULES = range(8)
"""Threads ascending, descending, at random; asynchronous copies as late or as early as allowed;
warps side by side, or each as far ahead of the others as it comes."""

SHARED_LIMIT = 163 << 10
"""Bytes a block of sm_80, the least that these kernels are built for."""


def code_of(dtype: torch.dtype) -> int:
    return DTYPES.index(dtype)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def library() -> ctypes.CDLL:
    """Builds it once for these sources and this compiler; skips the test where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA kernels are run on the host by a build of g++")
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    digest.update(subprocess.run([compiler, "--version"], capture_output=True).stdout)
    for path in (SOURCE, *sorted((INCLUDE / "headrace" / "cuda").iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / ".pytest_cache" / "d"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"cuda_host_{digest.hexdigest()[:16]}.so"
    if not built.exists():
        for old in folder.glob("cuda_host_*.so"):
            old.unlink()
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / "library.so"
            command = [compiler, *FLAGS, f"-I{INCLUDE}", str(SOURCE), "-o", str(made)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
            assert not run.stderr, run.stderr
            made.rename(built)
    return ctypes.CDLL(str(built))
