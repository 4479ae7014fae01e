"""What runs here: a GPU and its types, or, for a dry run, this CPU in its place."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace_kernels import dispatch, verified

DRY_RUN_REMEDY = "for a dry run, start it with TRITON_INTERPRET=1 and the triton package installed"


@dataclass(frozen=True)
class Machine:
    device: torch.device
    arch: str
    """sm_90 and the like."""
    dry_run: bool
    seed: int

    @classmethod
    def find(cls, *, dry_run: bool, seed: int) -> Machine | str:
        """The first GPU or, for a dry run, the CPU; or why there is neither."""
        if dry_run:
            if not dispatch.interprets_triton():
                return DRY_RUN_REMEDY
            return cls(torch.device("cpu"), platform.machine(), True, seed)
        if not torch.cuda.is_available():
            return "there is no CUDA device: --dry-run walks through all stages on a CPU"
        device = torch.device("cuda", 0)
        return cls(device, dispatch.device_arch(device), False, seed)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations. The interpreter's bfloat16 is wrong."""
        return torch.float16 if self.dry_run else torch.bfloat16

    def facts(self, head_dim: int = 128, page_size: int = 64) -> dispatch.KernelFacts:
        return dispatch.KernelFacts(
            device=self.device.type,
            arch=self.arch,
            dtype=self.dtype,
            head_dim=head_dim,
            page_size=page_size,
        )

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry_run else full

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed and on what they are for."""
        seed = self.seed + sum(ord(letter) << (index % 20) for index, letter in enumerate(name))
        return torch.Generator(self.device).manual_seed(seed)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median_us(self, call: Callable[[], object]) -> float:
        """Microseconds of one call, on the device: the median of many replays of a CUDA graph."""
        if self.dry_run:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(call, rep=60, return_mode="median")) * 1000

    def build_cuda_kernels(self, root: Path) -> None:
        """Compile CUDA C++ for this architecture, unless that was done since its sources changed.

        Before anything asks for those kernels. Without nvcc they are left out, with a line.
        """
        folders = (root / "csrc" / "cuda", root / "csrc" / "include" / "headrace" / "cuda")
        sources = [path for folder in folders for path in folder.iterdir()]
        built = list((root / "kernels" / "headrace_kernels").glob("_CUDA*.so"))
        newest = max(path.stat().st_mtime for path in sources)
        if built and built[0].stat().st_mtime > newest:
            return
        number = self.arch.removeprefix("sm_")
        architecture = f"{number[:-1]}.{number[-1]}" + ("a" if number == "90" else "")
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=root,
            env={**os.environ, "TORCH_CUDA_ARCH_LIST": architecture},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or "warning: no CUDA kernels" in done.stderr:
            print(f"CUDA C++ is left out: {(done.stderr or done.stdout)[-1500:]}")

    def describe(self, root: Path, commit: str) -> dict[str, Any]:
        """What a record must agree on for its cases to stand beside each other."""
        described = {
            "gpu": platform.processor() or platform.machine(),
            "arch": self.arch,
            "driver": None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "seed": self.seed,
            "commit": commit or _commit(root),
            "sources": {
                f"{candidate}/{stem}": verified.source_hash(candidate, stem)
                for candidate in ("triton", "cuda")
                for stem in dispatch.OPS
                if (verified.PACKAGE / candidate / f"{stem}.py").exists()
            },
            "dry run": self.dry_run,
        }
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            described["gpu"] = properties.name
            described["memory GiB"] = round(properties.total_memory / 2**30, 1)
            described["driver"] = _driver()
        return described


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command)


def _commit(root: Path) -> str | None:
    return _output(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().split("\n")[0]
