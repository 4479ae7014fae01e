"""What the microbenchmarks share: limits that are measured, and the table."""

from __future__ import annotations

import pytest
import torch

from headrace_kernels import bench, native
from headrace_kernels.bench import Case, Ceilings

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

CEILINGS = Ceilings(
    memory=10e9, cache=100e9, operations={"fp32": 100e9, "bf16": 200e9, "int8": 400e9}
)


def case(nbytes: int, operations: float, **others: object) -> Case:
    return Case("a case", lambda kernels: None, nbytes, operations, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "seconds", "bound"),
    [
        (case(10**9, 0.5e9), 0.01, "cache"),
        (case(10**9, 1e9, from_memory=True), 0.1, "memory"),
        (case(10**9, 100e9, from_memory=True), 1.0, "fp32"),
        (case(10**9, 100e9, arithmetic="int8", from_memory=True), 0.25, "int8"),
    ],
)
def test_the_limit_is_the_slower_of_moving_and_computing(
    what: Case, seconds: float, bound: str
) -> None:
    assert CEILINGS.seconds(what) == (pytest.approx(seconds), bound)


def test_a_row_of_the_table() -> None:
    row = bench.line(case(10**9, 2e9, from_memory=True), CEILINGS, reference=0.8, seconds=0.2)
    assert row.split() == [
        *("a", "case", "800000.0", "200000.0", "4.0x", "1000000", "2000.00", "5.0", "0.010"),
        *("50%", "memory"),
    ]


@pytest.mark.parametrize("kind", ["read", "fp32", "bf16", "int8"])
def test_ceilings_count_what_they_did(isa: str, threads: int, kind: str) -> None:
    done = torch.zeros(5, dtype=torch.float64)
    torch.ops.headrace.ceiling(kind, torch.ones(5 * bench.CHUNK_BYTES // 4), done)
    assert (done == done[0]).all() and done[0] > 1e4
    if kind == "read":
        assert done[0] == bench.CHUNK_BYTES


def test_ceilings_refuse_what_they_cannot_measure() -> None:
    done = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="there is no ceiling fp64"):
        torch.ops.headrace.ceiling("fp64", torch.ones(4), done)
    with pytest.raises(RuntimeError, match="memory must hold 65536 values a chunk"):
        torch.ops.headrace.ceiling("read", torch.ones(4), done)
    torch.library.opcheck(torch.ops.headrace.ceiling.default, ("fp32", torch.ones(4), done))


def test_weights_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MEMORY_BYTES", 1000)
    first = torch.arange(100)
    following = bench.in_turn(lambda: first)
    tensors = [following() for _ in range(4)]
    assert all(torch.equal(tensor, first) for tensor in tensors)
    assert [tensor.data_ptr() for tensor in tensors[:2]] == [t.data_ptr() for t in tensors[2:]]
    assert tensors[0].data_ptr() != tensors[1].data_ptr()


def test_calls_are_timed_in_turn() -> None:
    calls: list[str] = []
    times = bench.medians((lambda: calls.append("a"), lambda: calls.append("b")), 0.001)
    assert len(times) == 2 and min(times) > 0
    assert calls[:4] == ["a", "a", "b", "b"] and {"a", "b"} == set(calls[4:])
