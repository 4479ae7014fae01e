"""Builds the native kernels `headrace_kernels._C` and `._CUDA`; pyproject.toml has the rest.

The sources use the limited C API and torch's stable ABI only, so one build serves every
Python >= 3.11 and every torch >= 2.11. The extensions are optional: without torch or a working
compiler there is a warning, and the package runs on the plain torch reference. `_CUDA` is built
where torch is a CUDA build and nvcc is found, under CUDA_HOME or on the path, for the
architectures of TORCH_CUDA_ARCH_LIST ("9.0a" is an H200's), or for those that nvcc.py names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from headrace_kernels.cuda import nvcc  # noqa: E402 (the standard library only)

STABLE_ABI_OF_TORCH = (2, 11)
"""The oldest torch we run on: features that are newer than this fail to compile."""
CUDA_MODULE = "headrace_kernels._CUDA"


def compile_jobs() -> int:
    """MAX_JOBS, as for other torch extensions, or one for each CPU of this process."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count()
    return int(os.environ.get("MAX_JOBS") or cpus or 1)


def torch_target_version() -> str:
    """The macro with which newer features of torch fail to compile."""
    major, minor = STABLE_ABI_OF_TORCH
    return f"TORCH_TARGET_VERSION={hex(major << 56 | minor << 48)}"


def build_cuda(to: Path, objects: Path) -> None:
    """Compile and link csrc/cuda for the torch of this environment."""
    from torch.utils import cpp_extension

    found = nvcc.find(os.environ.get("CUDA_HOME"))
    assert found is not None
    compiler = nvcc.Compiler(
        nvcc=found,
        root=Path(__file__).parent.resolve(),
        targets=nvcc.targets_of(os.environ.get("TORCH_CUDA_ARCH_LIST", "")),
        includes=[*cpp_extension.include_paths(), sysconfig.get_path("include")],
        macros=[torch_target_version()],
    )
    compiled = compiler.compile_all(objects, compile_jobs())
    folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    compiler.link(list(compiled), [*folders, "-lc10", "-ltorch_cpu", "-ltorch_cuda"], to)


def cuda_extensions() -> list[Extension]:
    """`_CUDA`, where it can be built."""
    import torch

    if torch.version.cuda is None or nvcc.find(os.environ.get("CUDA_HOME")) is None:
        return []
    # Its sources are build_cuda's: torch would ask that nvcc and it are of one version.
    return [Extension(CUDA_MODULE, [], py_limited_api=True, optional=True)]


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

        def build_extension(self, extension: Extension) -> None:
            if extension.name != CUDA_MODULE:
                super().build_extension(extension)
                return
            try:
                build_cuda(
                    Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / "cuda"
                )
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", "")
                print(f"warning: no CUDA kernels: {error}\n{said}", file=sys.stderr)

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

    extension = CppExtension(
        "headrace_kernels._C",
        sources,
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        include_dirs=[str(Path("csrc/include").resolve())],
        define_macros=[tuple(torch_target_version().split("="))],
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
        "ext_modules": [extension, *cuda_extensions()],
        "cmdclass": {"build_ext": ParallelBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


sources = sorted(
    str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp")
)
setup(**(native_extension(sources) if sources else {}))
