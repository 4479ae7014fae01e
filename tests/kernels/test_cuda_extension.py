"""How the CUDA kernels are built, gated, loaded and chosen; nothing of it needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from headrace_kernels import dispatch, verified
from headrace_kernels.cuda import compile_gate, extension, nvcc
from headrace_kernels.dispatch import KernelFacts

ROOT = Path(__file__).parents[2]
FACTS = KernelFacts(device="cuda", arch="sm_90", dtype=torch.bfloat16, head_dim=128, page_size=64)
needs_nvcc = pytest.mark.skipif(nvcc.find() is None, reason="there is no nvcc on the path")
STEMS = ("attention", "kv_copy", "quantization", "quantized_linear")


def test_architectures_are_those_of_torchs_list() -> None:
    assert nvcc.targets_of("") == nvcc.TARGETS
    assert nvcc.targets_of("9.0a") == ("90a",)
    assert nvcc.targets_of("8.0;9.0a 10.0+PTX") == ("80", "90a", "100")


def test_the_digest_follows_every_source(tmp_path: Path) -> None:
    folders = [tmp_path / "csrc" / "cuda", tmp_path / "csrc" / "include" / "headrace" / "cuda"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "one.cuh").write_text("1")
    seen = {nvcc.digest(tmp_path)}
    for folder in folders:
        (folder / "one.cuh").write_text("2")
        seen.add(nvcc.digest(tmp_path))
    assert len(seen) == 3


def test_what_is_verified_follows_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for built in ("one", "two"):
        monkeypatch.setattr(extension, "sources", lambda built=built: built)
        hashes.add(verified.source_hash("cuda", "attention"))
        hashes.add(verified.source_hash("triton", "attention"))
    assert len(hashes) == 3


@pytest.mark.skipif(extension.unavailable() is None, reason="the CUDA kernels are built")
def test_without_the_module_every_stem_says_so() -> None:
    for stem in STEMS:
        (own,) = [c for c in dispatch.CANDIDATES[stem] if c.name == "cuda"]
        assert "not built" in str(own.declines(FACTS))
        with pytest.raises(dispatch.KernelUnavailableError, match="not built"):
            dispatch.choose(FACTS, {stem: "cuda"})


@pytest.mark.parametrize("stem", STEMS)
def test_with_the_module_it_is_chosen_only_if_asked_for_or_verified(
    stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda: None)
    monkeypatch.setattr(extension, "sources", lambda: "these")
    monkeypatch.setattr(verified, "_record", dict)
    assert dict(dispatch.choose(FACTS, {stem: "cuda"}).names)[stem] == "cuda"
    assert dict(dispatch.choose(FACTS).names)[stem] != "cuda"
    record = {"cuda": {stem: {"sm_90": verified.source_hash("cuda", stem)}}}
    monkeypatch.setattr(verified, "_record", lambda: record)
    assert dict(dispatch.choose(FACTS).names)[stem] == "cuda"


@needs_nvcc
def test_the_record_is_of_these_sources() -> None:
    """If not: python -m headrace_kernels.cuda.compile_gate --write"""
    for targets in json.loads(compile_gate.RECORD.read_text()).values():
        assert targets.keys() == set(nvcc.TARGETS)
        assert {of_target["source"] for of_target in targets.values()} == {nvcc.digest(ROOT)}


LOG = """ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem, 424 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twoILi1EEvv' for 'sm_80'
ptxas info    : Function properties for _Z3twoILi1EEvv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 424 bytes cmem[0]
"""


def test_the_gate_reads_and_objects() -> None:
    one, two = compile_gate.read_resources(LOG).values()
    assert one == {"registers": 40, "stack": 8, "spills": 16, "shared": 32}
    assert two == {"registers": 255, "stack": 0, "spills": 0, "shared": 0}
    assert list(compile_gate.objections("one", one, "")) == ["8 bytes of stack, 16 spilled"]
    assert list(compile_gate.objections("two<1>", two, "")) == ["255 registers, more than 128"]
    assert len(list(compile_gate.objections("decode_attention<64>", two, "HMMA.16816"))) == 2


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_every_target() -> None:
    command = [sys.executable, "-m", "headrace_kernels.cuda.compile_gate", "--all"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


LOADED = """
import importlib.machinery, importlib.util, os, sys
import torch
sys.setdlopenflags(os.RTLD_LAZY)  # what only a CUDA build of torch has is not called
loader = importlib.machinery.ExtensionFileLoader("_CUDA", sys.argv[1])
importlib.util.module_from_spec(importlib.util.spec_from_loader("_CUDA", loader))
ops = torch.ops.headrace_cuda
print(ops.sources(), ops.decode_plan_bytes(10, 3), ops.copy_blocks.default._schema)
"""


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_module_links_and_registers_its_ops(tmp_path: Path) -> None:
    found = nvcc.find()
    assert found is not None
    compiler = nvcc.Compiler(
        nvcc=found,
        root=ROOT,
        targets=("90a",),
        includes=[*cpp_extension.include_paths(), sysconfig.get_path("include")],
        macros=["TORCH_TARGET_VERSION=0x020b000000000000"],
    )
    objects = compiler.compile_all(tmp_path / "objects", len(os.sched_getaffinity(0)))
    folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    compiler.link(list(objects), [*folders, "-lc10", "-ltorch_cpu"], tmp_path / "_CUDA.so")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "_CUDA.so")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split()[:2] == [nvcc.digest(ROOT), str(32 * 14 + 16 * 3)]
    assert "copy_blocks(Tensor src, Tensor(a!) dst, Tensor pairs) -> ()" in said
