"""Builds the native kernels `headrace_kernels._C`; everything else is in pyproject.toml.

The sources use the limited C API and torch's stable ABI only, so one build serves every
Python >= 3.11 and every torch >= 2.11. The extension is optional: without torch or a working
compiler there is a warning, and the package runs on the plain torch reference.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import setup

STABLE_ABI_OF_TORCH = (2, 11)
"""The oldest torch we run on: features that are newer than this fail to compile."""


def native_extension(sources: list[str]) -> dict[str, Any]:
    """The arguments of setup() that build `sources`; none, with a warning, without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        message = "warning: no native kernels: the build environment has no torch"
        print(f"{message} (remedy: --no-build-isolation)", file=sys.stderr)
        return {}

    major, minor = STABLE_ABI_OF_TORCH
    extension = CppExtension(
        "headrace_kernels._C",
        sources,
        depends=sorted(map(str, Path("csrc/include").rglob("*.h"))),
        include_dirs=[str(Path("csrc/include").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", hex(major << 56 | minor << 48))],
        # Fused multiply-adds stand where the kernels write them: a value is computed the same way
        # wherever the compiler inlines it.
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off"],
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


sources = sorted(
    str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp")
)
setup(**(native_extension(sources) if sources else {}))
