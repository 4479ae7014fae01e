"""How csrc/cuda is compiled: command lines of nvcc, for setup.py and the compile gate.

The standard library only: setup.py loads it before there is anything else.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("80", "90a", "100")
"""Compute capabilities that a build for any GPU has code for; others take the PTX of the first."""
FLAGS = (
    "-std=c++20",
    "-O3",
    # Fused multiply-adds stand where the kernels write them, as on a CPU.
    "--fmad=false",
    "--compiler-options=-fPIC,-fvisibility=hidden",
)


def find(cuda_home: str | None = None) -> Path | None:
    """nvcc of a toolkit's folder, or of the path; None if there is none."""
    if cuda_home and (nvcc := Path(cuda_home) / "bin" / "nvcc").exists():
        return nvcc
    found = shutil.which("nvcc")
    return Path(found) if found else None


def version(nvcc: Path) -> str:
    """Such as "13.0"."""
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return run.stdout.partition("release ")[2].partition(",")[0]


def targets_of(arch_list: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, such as "9.0a" or "8.0;9.0a", as TARGETS; all of those if empty."""
    names = arch_list.replace(" ", ";").split(";")
    return tuple(name.removesuffix("+PTX").replace(".", "") for name in names if name) or TARGETS


def sources(root: Path) -> list[Path]:
    return sorted((root / "csrc" / "cuda").glob("*.cu"))


def digest(root: Path) -> str:
    """Of everything that the kernels are compiled from."""
    files = [*(root / "csrc" / "cuda").iterdir()]
    # The .h file is the host's.
    files += (root / "csrc" / "include" / "headrace" / "cuda").glob("*.cuh")
    text = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(files, key=lambda path: path.name):
        text.update(path.name.encode() + b"\0" + path.read_bytes())
    return text.hexdigest()[:16]


@dataclass(frozen=True)
class Compiler:
    """nvcc for one checkout and one torch."""

    nvcc: Path
    root: Path
    """Of the checkout."""
    targets: Sequence[str]
    includes: Sequence[str]
    """Folders of the headers of torch and Python."""
    macros: Sequence[str]
    """TORCH_TARGET_VERSION=0x..."""

    def compile(self, source: Path, to: Path) -> str:
        """Make an object file; what the assembler says of each kernel.

        Raises CalledProcessError.
        """
        return self._run(
            *FLAGS,
            *self._gencode(),
            "--resource-usage",
            "-DUSE_CUDA",
            f'-DHEADRACE_CUDA_SOURCES="{digest(self.root)}"',
            *(f"-D{macro}" for macro in self.macros),
            *(f"-I{folder}" for folder in (self.root / "csrc" / "include", *self.includes)),
            "-c",
            source,
            "-o",
            to,
        )

    def compile_all(self, folder: Path, jobs: int) -> dict[Path, str]:
        """Objects in `folder`, and for each what the assembler says."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = sources(self.root)
        objects = [folder / f"{path.stem}.o" for path in paths]
        with ThreadPoolExecutor(jobs) as pool:
            return dict(zip(objects, pool.map(self.compile, paths, objects), strict=True))

    def link(self, objects: Sequence[Path], libraries: Sequence[str], to: Path) -> None:
        """A shared library of objects; CUDA's own runtime goes into it. `libraries`: -L and -l."""
        to.parent.mkdir(parents=True, exist_ok=True)
        self._run("-shared", "--cudart=static", *objects, *libraries, "-o", to)

    def _gencode(self) -> list[str]:
        codes = [(target, f"sm_{target}") for target in self.targets]
        if "80" in self.targets:
            codes.append(("80", "compute_80"))
        return [f"--generate-code=arch=compute_{target},code={code}" for target, code in codes]

    def _run(self, *arguments: str | Path) -> str:
        command = [str(self.nvcc), *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise subprocess.CalledProcessError(
                run.returncode, command[:1], output=run.stdout, stderr=run.stderr[-4000:]
            )
        return run.stdout + run.stderr
