"""Triton kernels compiled for GPUs that are not here, in processes that do not interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from headrace_kernels import dispatch
from headrace_kernels.triton import builds

ROOT = Path(__file__).parent.parent.parent
TRITON_OF_THE_GPU_IMAGE = "3.6.0"


def run_python(*arguments: str, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python that compiles; `packages` go before those of this environment."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [*([packages] if packages else []), ROOT / "kernels"]
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def check_gate(*options: str, packages: Path | None = None) -> None:
    done = run_python("-m", "headrace_kernels.triton.compile_gate", *options, packages=packages)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_what_changed_compiles() -> None:
    """The record vouches for sources that are as they were when it was written."""
    check_gate()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_compiles() -> None:
    check_gate("--all")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_compiles_with_an_older_triton(tmp_path: Path) -> None:
    wanted = f"triton=={TRITON_OF_THE_GPU_IMAGE}"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), wanted]
    installed = run_python(*pip)
    if installed.returncode:
        pytest.skip(f"cannot install {wanted}: {installed.stderr[-200:]}")
    check_gate("--all", "--arch", "sm_90", packages=tmp_path)


def test_every_triton_kernel_says_what_it_ships() -> None:
    folder = Path(builds.__file__).parent
    there = {stem for stem in dispatch.OPS if (folder / f"{stem}.py").exists()}
    code = "from headrace_kernels.triton import compile_gate; print(*compile_gate.stems())"
    done = run_python("-c", code)
    assert there <= set(done.stdout.split()), done.stderr


KERNELS = """
    import triton, triton.language as tl
    from headrace_kernels.triton.builds import Build
    from headrace_kernels.triton.compile_gate import compile_build

    @triton.jit
    def product(a, b, c, K, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        at = i[:, None] * SIZE + i[None, :]
        total = tl.zeros((SIZE, SIZE), tl.float32)
        for k in range(K):
            step = k * SIZE * SIZE
            total = tl.dot(tl.load(a + step + at), tl.load(b + step + at), total)
        tl.store(c + at, total)

    def compiled(size, **options):
        types = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32"}
        build = Build(name="x", kernel=product, types=types, constants={"SIZE": size}, **options)
        print("objections:", compile_build(build, "sm_90")[1])

    compiled(64, expects=("wgmma.mma_async",))
    compiled(16, expects=("wgmma.mma_async",))
    compiled(64, max_registers=10)
    compiled(128, num_warps=1)
    compiled(128, num_warps=8, num_stages=8)
    compiled(48)
"""


def test_the_gate_objects(tmp_path: Path) -> None:
    script = tmp_path / "kernels.py"  # Triton reads the source of what it compiles
    script.write_text(textwrap.dedent(KERNELS))
    done = run_python(str(script))
    assert done.returncode == 0, done.stderr
    objections = [
        "objections: []",
        "has no wgmma.mma_async",
        "registers, more than 10",
        "spills: ",
        "of shared memory, more than 232448",
        "does not compile: ",
    ]
    lines = [line for line in done.stdout.splitlines() if line.startswith("objections:")]
    assert len(lines) == len(objections)
    for line, objection in zip(lines, objections, strict=True):
        assert objection in line
