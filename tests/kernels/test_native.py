"""The native extension as a whole: its ops' schemas, its threads, its checks of arguments."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace_kernels import dispatch, native
from headrace_kernels.cpu.fallback import log_once
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.reference import norm as reference_norm
from headrace_kernels.testing import TOLERANCES, assert_close, poisoned

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

FACTS = KernelFacts(device="cpu", arch="x86_64", dtype=torch.bfloat16, head_dim=64, page_size=16)
STEMS = ("norm", "rope", "activation")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = native.num_threads()
    native.set_num_threads(3)
    yield
    native.set_num_threads(before)


def in_its_own_process(code: str) -> str:
    """Run Python code with our path; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return run.stdout


def table(positions: int = 32, pairs: int = 8) -> Tensor:
    return torch.randn(positions, 2, pairs)


def rope_arguments(tokens: int = 4, slots: Tensor | None = None) -> dict[str, Any]:
    return {
        "qkv": torch.randn(tokens, 4 * 16),
        "positions": torch.arange(tokens),
        "cos_sin": table(),
        "kv_cache": torch.zeros(3, 2, 1, 16, 16),
        "slot_mapping": torch.arange(tokens) if slots is None else slots,
        "q_out": poisoned(tokens, 2, 16),
        "q_norm": torch.ones(16),
        "k_norm": torch.ones(16),
        "eps": 1e-6,
    }


def test_the_native_kernels_are_chosen() -> None:
    chosen = dict(dispatch.choose(FACTS).names)
    assert {stem: chosen[stem] for stem in STEMS} == dict.fromkeys(STEMS, "cpu")


@pytest.mark.parametrize("stem", STEMS)
def test_what_they_decline(stem: str) -> None:
    module = importlib.import_module(f"headrace_kernels.cpu.{stem}")
    half = KernelFacts(device="cpu", arch="", dtype=torch.float16, head_dim=64, page_size=16)
    assert module.declines(half) == "takes float32 and bfloat16, not torch.float16"
    cuda = KernelFacts(device="cuda", arch="sm_90", dtype=torch.bfloat16, head_dim=64, page_size=16)
    [reason] = [
        decision.reason
        for decision in dispatch.explain(cuda)
        if (decision.stem, decision.candidate) == (stem, "cpu")
    ]
    assert reason == "runs on a CPU only"


def test_a_missing_op_is_not_built() -> None:
    assert native.missing("rms_norm") is None
    assert native.missing("no_such_op") == "not built: the native kernels lack no_such_op"


def test_without_the_extension_the_reference_runs() -> None:
    threads, reasons = in_its_own_process(
        "import sys, torch; sys.modules['headrace_kernels._C'] = None\n"
        "from headrace_kernels import dispatch, native\n"
        "from headrace_kernels.ops.norm import rms_norm\n"
        "rms_norm(torch.ones(1, 8), torch.ones(8), 0.0)\n"
        "native.set_num_threads(2); print(native.num_threads(), native.cpu_isa())\n"
        "facts = dispatch.KernelFacts(\n"
        "    device='cpu', arch='', dtype=torch.float32, head_dim=64, page_size=16)\n"
        "print({d.reason for d in dispatch.explain(facts) if d.candidate == 'cpu'})\n"
    ).splitlines()
    assert threads == "1 None"
    assert reasons.startswith("{'not built (remedy: install a C++ compiler")


OPCHECKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "embedding": lambda: (torch.tensor([2, 0]), torch.randn(3, 40), torch.empty(2, 40)),
    "rms_norm": lambda: (torch.randn(3, 40), torch.randn(40), 1e-5, torch.empty(3, 40)),
    "add_rms_norm": lambda: (
        torch.randn(3, 40),
        torch.randn(3, 40),
        torch.randn(40),
        1e-5,
        torch.empty(3, 40),
    ),
    "silu_and_mul": lambda: (torch.randn(3, 40), torch.empty(3, 20)),
    "rope_and_write_kv": lambda: tuple(rope_arguments().values()),
}


@pytest.mark.parametrize("op", OPCHECKS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.headrace, op).default, OPCHECKS[op]())


def test_instruction_sets(isa: str) -> None:
    assert native.cpu_isa() == isa
    with pytest.raises(RuntimeError, match="no instruction set sse9; it is scalar, avx2 or avx512"):
        native.set_cpu_isa("sse9")


@pytest.mark.skipif(native.cpu_isa() != "avx512", reason="this CPU has no avx512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_avx2_and_avx512_agree_to_the_bit(dtype: torch.dtype) -> None:
    x, weight, rope = torch.randn(5, 666).to(dtype), torch.randn(666), rope_arguments()
    results = []
    for isa in ("avx2", "avx512"):
        native.set_cpu_isa(isa)
        out, activated = poisoned(5, 666, dtype=dtype), poisoned(5, 333, dtype=dtype)
        rope |= {"q_out": poisoned(4, 2, 16), "kv_cache": torch.zeros(3, 2, 1, 16, 16)}
        torch.ops.headrace.rms_norm(x, weight, 1e-5, out)
        torch.ops.headrace.silu_and_mul(x, activated)
        torch.ops.headrace.rope_and_write_kv(*rope.values())
        results.append((out, activated, rope["q_out"], rope["kv_cache"]))
    for narrow, wide in zip(*results, strict=True):
        assert torch.equal(narrow, wide)


def test_many_operations_on_changing_numbers_of_threads() -> None:
    x, weight = torch.randn(700, 64), torch.randn(64)
    expected = poisoned(700, 64)
    torch.ops.headrace.rms_norm(x, weight, 1e-5, expected)
    before = native.num_threads()
    for threads in (1, 4, 2, 7, 3):
        native.set_num_threads(threads)
        assert native.num_threads() == threads
        for _ in range(200):
            out = poisoned(700, 64)
            torch.ops.headrace.rms_norm(x, weight, 1e-5, out)
            assert torch.equal(out, expected)
    native.set_num_threads(before)


def test_workers_that_fell_asleep_wake_up(three_threads: None) -> None:
    x, weight = torch.randn(2000, 64), torch.randn(64)
    for _ in range(20):
        time.sleep(0.002)
        out = poisoned(2000, 64)
        torch.ops.headrace.rms_norm(x, weight, 1e-5, out)
        assert not out.isnan().any()


def test_two_callers_at_a_time(three_threads: None) -> None:
    x, weight = torch.randn(2000, 64), torch.randn(64)
    expected = poisoned(2000, 64)
    reference_norm.rms_norm(x, weight, 1e-5, expected)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(100):
                out = poisoned(2000, 64)
                torch.ops.headrace.rms_norm(x, weight, 1e-5, out)
                assert_close(out, expected.double(), TOLERANCES["norm", torch.float32])
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_makes_its_own_workers() -> None:
    """In a process of its own. The child uses nothing of torch's OpenMP, which hangs there."""
    in_its_own_process(
        "import os, signal, torch; from headrace_kernels import native; native.unavailable()\n"
        "native.set_num_threads(3); x = torch.randn(2000, 64)\n"
        "mine, childs = torch.zeros(2000, 64), torch.zeros(2000, 64)\n"
        "torch.ops.headrace.rms_norm(x, torch.ones(64), 0.0, mine)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    torch.ops.headrace.rms_norm(x, torch.ones(64), 0.0, childs)\n"
        "    os._exit(bytes(childs.numpy()) != bytes(mine.numpy()))\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


def test_a_process_with_workers_exits() -> None:
    in_its_own_process(
        "import torch; from headrace_kernels import native; native.unavailable()\n"
        "native.set_num_threads(4); x = torch.ones(2000, 64)\n"
        "torch.ops.headrace.rms_norm(x, torch.ones(64), 0.0, x)\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": torch.tensor([0, 1, 48, 2])}, "slot 48 of token 2 is out of range"),
        ({"slot_mapping": torch.tensor([0, -2, 1, 2])}, "slot -2 of token 1 is out of range"),
        ({"positions": torch.tensor([0, 1, 2, 32])}, "position 32 of token 3 is out of range"),
        ({"k_norm": None}, "q_norm and k_norm come together"),
        ({"qkv": torch.zeros(4, 65)}, r"qkv must be a CPU tensor \[4, 64\]"),
        ({"cos_sin": table().double()}, "cos_sin has the wrong type"),
    ],
)
def test_rope_refuses_what_it_cannot_address(change: dict[str, Any], message: str) -> None:
    arguments = rope_arguments() | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.rope_and_write_kv(*arguments.values())
    assert not arguments["kv_cache"].any()


def test_what_is_refused_goes_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    kernels = dispatch.choose(FACTS, dict.fromkeys(STEMS, "cpu"))
    x, weight = torch.randn(4, 3, 8), torch.randn(8).bfloat16()
    out, expected = poisoned(4, 3, 8, dtype=torch.float64), poisoned(4, 3, 8, dtype=torch.float64)
    reference_norm.rms_norm(x, weight, 1e-5, expected)
    log_once.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            kernels.rms_norm(x, weight, 1e-5, out)
    assert torch.equal(out, expected)
    [record] = caplog.records
    assert record.getMessage().startswith("rms_norm goes to the reference: ")
    assert record.getMessage().endswith("x must have 2 dimensions")
    residual, half = torch.randn(4, 8), torch.randn(4, 8).half()
    total = residual + half
    kernels.add_rms_norm(half, residual, weight.float(), 1e-5, half)
    assert torch.equal(residual, total), "the residual is added once"
    with pytest.raises(IndexError):
        kernels.rope_and_write_kv(
            *(rope_arguments() | {"positions": torch.full((4,), 99)}).values()
        )


def test_wrong_tensors_are_refused() -> None:
    x = torch.randn(4, 8)
    ops = torch.ops.headrace
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        ops.rms_norm(x.half(), torch.ones(8), 1e-5, x)
    with pytest.raises(RuntimeError, match="weight must be a contiguous CPU tensor"):
        ops.rms_norm(x, torch.ones(7), 1e-5, x)
    with pytest.raises(RuntimeError, match="residual has the wrong type"):
        ops.add_rms_norm(x, x.bfloat16(), torch.ones(8), 1e-5, x)
    with pytest.raises(RuntimeError, match=r"gate_up must be a CPU tensor \[4, 16\]"):
        ops.silu_and_mul(x, x)
    with pytest.raises(RuntimeError, match="threads must be 1 to 4096, not 0"):
        native.set_num_threads(0)
