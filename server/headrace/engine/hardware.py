"""What this process may use: cores, memory, devices. Probed on demand, never at import."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from headrace.engine.resolution import Hardware
from headrace.errors import ConfigError

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")
ISA_FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
    "avx2": {"avx2", "fma", "f16c"},
}
"""What csrc/cpu/isa.cpp asks of a CPU before it runs that level; best first."""
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def probe(device: str = "auto", *, deterministic: bool = False) -> Hardware:
    """Describe `device` (cpu, cuda, cuda:N, auto). Imports torch only if a GPU may be meant.

    `deterministic`: count those kernels only whose rows do not depend on the batch.

    Raises ConfigError for a device that is not there.
    """
    if device != "cpu" and (device != "auto" or Path("/dev/nvidiactl").exists()):
        gpu = _probe_gpu(device, deterministic=deterministic)
        if gpu is not None:
            return gpu
    if device not in ("auto", "cpu"):
        raise ConfigError(f"--device {device}: no such device here. Use cpu, cuda or cuda:N.")
    flags = _cpu_flags()
    return Hardware(
        device="cpu",
        name=_cpu_name(),
        cores=usable_cores(),
        memory_bytes=_available_memory(),
        has_bf16=bool(BF16_FLAGS & flags),
        has_native=importlib.util.find_spec("headrace_kernels._C") is not None,
        cpu_isa=next((isa for isa, needed in ISA_FLAGS.items() if needed <= flags), "scalar"),
    )


def usable_cores() -> int:
    """Cores within affinity and the CPU quotas of the cgroups, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = affinity or 1
    for folder in _cgroups():
        quota = _read(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    return max(cores, 1)


def _available_memory() -> int:
    available = int(psutil.virtual_memory().available)
    for folder in _cgroups():
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            available = min(available, int(limit) - int(used))
    return max(available, 0)


def _cgroups() -> list[Path]:
    """The cgroup (version 2) of this process and those around it: each may set limits."""
    own = next((line for line in _read(OWN_CGROUP).splitlines() if line.startswith("0::/")), "0::/")
    path = CGROUP / own.removeprefix("0::/")
    return [path, *(parent for parent in path.parents if parent.is_relative_to(CGROUP))]


def _probe_gpu(device: str, *, deterministic: bool) -> Hardware | None:
    import torch

    if not torch.cuda.is_available():
        return None
    index = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {device}: there are {torch.cuda.device_count()} GPU(s), counted from 0."
        )
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    return Hardware(
        device=f"cuda:{index}",
        name=torch.cuda.get_device_name(index),
        cores=usable_cores(),
        memory_bytes=free,
        has_bf16=capability >= (8, 0),
        total_bytes=total,
        has_fp8=capability >= (8, 9),
        product_kernels=product_kernels(torch.device("cuda", index), deterministic),
    )


def product_kernels(device: torch.device, deterministic: bool) -> tuple[str, ...]:
    """Stems of products of quantized weights that are not left to the reference on a device.

    None if the kernels of some other op cannot be chosen: loading will say which.
    """
    import torch

    from headrace_kernels import dispatch

    facts = dispatch.KernelFacts(
        device=device.type,
        arch=dispatch.device_arch(device),
        dtype=torch.bfloat16,
        head_dim=128,
        page_size=64,
        deterministic=deterministic,
    )
    try:
        decisions = dispatch.explain(facts)
    except dispatch.KernelUnavailableError:
        return ()
    return tuple(
        decision.stem
        for decision in decisions
        if decision.stem in ("quantized_linear", "scaled_linear")
        and decision.chosen
        and decision.candidate != "reference"
    )


def _cpu_flags() -> set[str]:
    for line in _read(CPUINFO).splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cpu_name() -> str:
    for line in _read(CPUINFO).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
