"""Builds the native kernels `headrace_kernels._C`; everything else is in pyproject.toml.

The sources use the limited C API and torch's stable ABI only, so one build serves every
Python >= 3.11 and every torch >= 2.11. The extension is optional: without torch or a working
compiler there is a warning, and the package runs on the plain torch reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup

STABLE_ABI_OF_TORCH = (2, 11)
"""The oldest torch we run on: features that are newer than this fail to compile."""


def compile_jobs() -> int:
    """MAX_JOBS, as for other torch extensions, or one for each CPU of this process."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count()
    return int(os.environ.get("MAX_JOBS") or cpus or 1)


def native_extension(sources: list[str]) -> dict[str, Any]:
    """The arguments of setup() that build `sources`; none, with a warning, without torch."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        message = "warning: no native kernels: the build environment has no torch"
        print(f"{message} (remedy: --no-build-isolation)", file=sys.stderr)
        return {}

    class ParallelBuild(BuildExtension):  # type: ignore[misc]
        """Compiles the sources of the extension side by side, without asking for ninja."""

        def build_extensions(self) -> None:
            compile_one_after_another = self.compiler.compile

            def compile(sources: list[str], *args: Any, **options: Any) -> list[str]:
                with ThreadPoolExecutor(compile_jobs()) as jobs:
                    objects = jobs.map(
                        lambda source: compile_one_after_another([source], *args, **options),
                        sources,
                    )
                    return [name for names in objects for name in names]

            self.compiler.compile = compile
            try:
                super().build_extensions()
            except (OSError, subprocess.CalledProcessError) as error:
                # The compiler cannot even be asked for its version; when it is there but fails,
                # `optional` below warns.
                print(f"warning: no native kernels: {error}", file=sys.stderr)

    major, minor = STABLE_ABI_OF_TORCH
    extension = CppExtension(
        "headrace_kernels._C",
        sources,
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        include_dirs=[str(Path("csrc/include").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", hex(major << 56 | minor << 48))],
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++20",
            "-fvisibility=hidden",
            # Fused multiply-adds stand where the kernels write them: a value is computed the same
            # way wherever the compiler inlines it.
            "-ffp-contract=off",
            # GCC 12 warns of its own AVX-512 headers (its bug 105593).
            "-Wno-maybe-uninitialized",
        ],
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": ParallelBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


sources = sorted(
    str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp")
)
setup(**(native_extension(sources) if sources else {}))
