"""Recorded steps: replays compute what the ops did, on what memory holds now."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from headrace_kernels import native

if native.missing("begin_recording"):
    pytest.skip("the native kernels are not built", allow_module_level=True)

from headrace_kernels.cpu import activation, norm
from headrace_kernels.cpu.tape import NotRecordable, record


def gated(x: Tensor, weight: Tensor, normalised: Tensor, out: Tensor) -> Tensor:
    norm.rms_norm(x, weight, 1e-5, normalised)
    activation.silu_and_mul(normalised.view(len(x), -1), out)
    return out


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(5, 64), torch.randn(64), torch.empty(5, 64), torch.empty(5, 32)


def test_a_replay_reads_what_memory_holds_now(tensors: tuple[Tensor, ...]) -> None:
    x, weight, normalised, out = tensors
    tape, result = record(lambda: gated(x, weight, normalised, out))
    assert result is out
    assert len(tape) == 2
    first = out.clone()
    expected = gated(2.0 + x, weight, torch.empty_like(normalised), torch.empty_like(out))
    x += 2.0
    normalised.fill_(torch.nan)
    out.fill_(torch.nan)
    tape.replay()
    assert torch.equal(out, expected)
    assert not torch.equal(out, first)


def test_a_copy_in_torch_is_named(tensors: tuple[Tensor, ...]) -> None:
    x, weight, normalised, out = tensors

    def step() -> Tensor:
        normalised.copy_(x)
        return gated(normalised, weight, normalised, out)

    with pytest.raises(NotRecordable, match="copy_"):
        record(step)
    record(lambda: gated(x, weight, normalised, out))  # nothing is left of the failure


def test_an_allocation_is_named(tensors: tuple[Tensor, ...]) -> None:
    x, weight, _, out = tensors
    with pytest.raises(NotRecordable, match="empty_like"):
        record(lambda: gated(x, weight, torch.empty_like(x), out))


def test_what_goes_to_the_reference_is_not_recorded(tensors: tuple[Tensor, ...]) -> None:
    x, weight, _, out = tensors
    halves = torch.empty(x.shape, dtype=torch.float16)
    with pytest.raises(NotRecordable):
        record(lambda: norm.rms_norm(x, weight, 1e-5, halves))


def test_an_error_ends_the_recording(tensors: tuple[Tensor, ...]) -> None:
    x, weight, normalised, out = tensors

    def fail() -> None:
        gated(x, weight, normalised, out)
        raise KeyError("step")

    with pytest.raises(KeyError):
        record(fail)
    tape, _ = record(lambda: gated(x, weight, normalised, out))
    assert len(tape) == 2


def test_recordings_of_recordings_are_refused() -> None:
    with pytest.raises(RuntimeError, match="records already"):
        record(lambda: record(lambda: None))


def test_another_thread_does_not_record(tensors: tuple[Tensor, ...]) -> None:
    x, weight, normalised, out = tensors

    def elsewhere() -> None:
        worker = threading.Thread(target=gated, args=(x, weight, normalised, out))
        worker.start()
        worker.join()

    tape, _ = record(elsewhere)
    assert len(tape) == 0


def test_a_forgotten_tape_is_gone(tensors: tuple[Tensor, ...]) -> None:
    x, weight, normalised, out = tensors
    tape, _ = record(lambda: gated(x, weight, normalised, out))
    number = tape._number
    del tape
    with pytest.raises(RuntimeError, match="no recording"):
        torch.ops.headrace.replay(number)


def test_a_tape_keeps_its_memory() -> None:
    def step() -> None:
        gated(*tensors)

    tensors = [torch.randn(5, 64), torch.randn(64), torch.empty(5, 64), torch.empty(5, 32)]
    tape, _ = record(step)
    tensors.clear()
    assert len(tape._memory) == 5
    tape.replay()
    assert tape._memory[2].isfinite().all()


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch; from headrace_kernels import native; native.unavailable();"
        "from headrace_kernels.cpu import norm; from headrace_kernels.cpu.tape import record;"
        "x = torch.ones(2, 16); y = torch.empty(2, 16);"
        "record(lambda: norm.rms_norm(x.view(2, 16), x[0], 1e-5, y));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
