"""What this process may use, as affinity, cgroups and the CPU's flags say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.engine import hardware
from headrace.engine.hardware import probe, product_kernels, usable_cores
from headrace_kernels import dispatch, native

CODE = (
    "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    "from headrace.engine.hardware import probe, usable_cores\n"
    "print(usable_cores(), probe('cpu').cores)\n"
)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_affinity_is_honoured() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "1"]


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's cgroup, two levels down; 8 cores are within affinity."""
    own, folder = tmp_path / "own", tmp_path / "cgroup" / "system.slice" / "model.service"
    folder.mkdir(parents=True)
    own.write_text("1:name=systemd:/elsewhere\n0::/system.slice/model.service\n")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "OWN_CGROUP", own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    return folder


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("", 8)],
)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_quota_at_any_level_is_honoured(
    cgroup: Path, levels: int, quota: str, cores: int
) -> None:
    folder = [cgroup, *cgroup.parents][levels]
    (folder / "cpu.max").write_text(quota)
    assert usable_cores() == cores


def test_the_memory_limit_of_a_cgroup_is_honoured(cgroup: Path) -> None:
    (cgroup.parent / "memory.max").write_text(str(3 << 20))
    (cgroup.parent / "memory.current").write_text(str(1 << 20))
    (cgroup / "memory.max").write_text("max")
    assert probe("cpu").memory_bytes == 2 << 20


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_the_flags_say_what_the_kernels_find() -> None:
    native.set_cpu_isa(probe("cpu").cpu_isa)  # refused if it were too high
    better = {"scalar": "avx2", "avx2": "avx512"}.get(probe("cpu").cpu_isa)
    if better is not None:
        with pytest.raises(RuntimeError, match=f"this CPU has no {better}"):
            native.set_cpu_isa(better)


def test_products_with_kernels_are_those_not_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, found = torch.device("cpu"), dispatch.explain
    expected = () if native.unavailable() else ("quantized_linear",)
    assert product_kernels(cpu, deterministic=False) == expected

    def none_is_invariant(facts: dispatch.KernelFacts) -> list[dispatch.Decision]:
        if facts.deterministic:
            raise dispatch.KernelUnavailableError("norm: none")
        return found(facts)

    monkeypatch.setattr(dispatch, "explain", none_is_invariant)
    assert product_kernels(cpu, deterministic=False) == expected
    assert product_kernels(cpu, deterministic=True) == ()
