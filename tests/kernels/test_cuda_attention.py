"""The CUDA kernels of decode attention, run on the host, against attention in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tests.kernels.cuda_host import SCHEDULES, SHARED_LIMIT, code_of, library
from torch import Tensor

from headrace_kernels.cuda import attention as cuda_attention
from headrace_kernels.kv_format import from_pages, to_pages, values_and_scales
from headrace_kernels.testing import (
    RAGGED_LENGTHS,
    Tolerance,
    assert_close,
    naive_attention,
    ragged_batch,
)

LOG2_E = 1.4426950408889634
POINTERS = (
    *("q", "out", "cache", "query_start", "seq_lens", "block_table"),
    *("counts", "items", "folds", "partials", "sums"),
)
STRIDES = ("q_stride", "out_stride", "block_stride", "kv_stride", "head_stride", "table_stride")
SIZES = ("requests", "rows", "kv_heads", "group", "page_size", "window", "capacity", "blocks")
TOLERANCES = {
    torch.bfloat16: Tolerance(2**-9, 2**-7, "weights and the output are rounded to 8 bits"),
    torch.float16: Tolerance(2**-12, 2**-10, "weights and the output are rounded to 11 bits"),
}
FORMATS = (
    (64, torch.bfloat16, torch.bfloat16),
    (64, torch.float16, torch.float16),
    (64, torch.bfloat16, torch.int8),
    (64, torch.float16, torch.float8_e4m3fn),
    (128, torch.bfloat16, torch.bfloat16),
    (128, torch.float16, torch.int8),
    (128, torch.bfloat16, torch.float8_e4m3fn),
)
DECODES = ((1, 1300), (1, 600), (1, 30))


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int) for name in SIZES),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: Sequence[tuple[int, int]] = DECODES
    heads: tuple[int, int, int] = (4, 1, 64)
    """(H, K, D)"""
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype = torch.bfloat16
    window: int = 0
    soft_cap: float = 0.0
    capacity: int = 64
    blocks: int = 3
    schedule: int = 0
    alone: int | None = None
    """Only this request of the batch has a query token."""


def cache_of(case: Case, num_blocks: int, seen: Tensor) -> Tensor:
    """One layer of a cache of three; what no token of the batch sees is NaN, or as bad."""
    _, kv_heads, dim = case.heads
    x = torch.randn(num_blocks, 3, 2, kv_heads, case.page_size, dim)
    layer = to_pages(x, case.cache_dtype)[:, 1]
    values, scales = values_and_scales(layer)
    unseen = ~seen.view(num_blocks, 1, 1, case.page_size).expand(values.shape[:-1])
    if scales is None:
        values[unseen] = float("nan")
    else:
        values.view(torch.int8)[unseen] = 0x7F
        scales[unseen] = float("nan")
    return layer


def run(case: Case) -> list[Tensor]:
    """What each decoding request's row became; asserts that it is right, and the padding 0."""
    torch.manual_seed(0)
    batch = ragged_batch(case.lengths, case.page_size, np.random.default_rng(0))
    heads, kv_heads, dim = case.heads
    lengths = list(case.lengths)
    seen = torch.zeros(batch.num_blocks * case.page_size, dtype=torch.bool)
    for request, (query, length) in enumerate(lengths):
        hidden = max(0, length - case.window) if case.window and query == 1 else 0
        seen[torch.from_numpy(batch.slots_of(request)[hidden:])] = True
    cache = cache_of(case, batch.num_blocks, seen)
    q = torch.randn(batch.num_rows, heads, dim).to(case.dtype)
    metadata = batch.metadata()
    starts = metadata.query_start_loc
    if case.alone is not None:
        ends = torch.arange(len(lengths) + 1) > case.alone
        starts = starts[case.alone] + ends.int()
    out = torch.full_like(q, float("nan"))
    _launch(case, q, cache, starts, metadata.seq_lens, metadata.block_table, out)

    rows = []
    dense = from_pages(cache)
    for request, (query, _) in enumerate(lengths):
        row = int(metadata.query_start_loc[request])
        if query != 1 or case.alone not in (None, request):
            continue
        slots = torch.from_numpy(batch.slots_of(request))
        keys, values = (
            dense[slots // case.page_size, i, :, slots % case.page_size].nan_to_num(0.0)
            for i in (0, 1)
        )
        expected = naive_attention(
            q[row : row + 1].float(),
            keys,
            values,
            dim**-0.5,
            case.window or None,
            case.soft_cap or None,
        )
        assert_close(out[row : row + 1], expected, TOLERANCES[case.dtype])
        rows.append(out[row].clone())
    if case.alone is None:
        assert not out[int(starts[-1]) :].any()
    return rows


def _launch(
    case: Case,
    q: Tensor,
    cache: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    table: Tensor,
    out: Tensor,
) -> None:
    requests = len(seq_lens)
    heads, kv_heads, dim = case.heads
    capacity = case.capacity
    memory = {
        "counts": torch.full((2,), -1, dtype=torch.int32),
        "items": torch.full((capacity + requests, 8), -7, dtype=torch.int32),
        "folds": torch.full((requests, 4), -7, dtype=torch.int32),
        "partials": torch.full((capacity, heads, dim), float("nan")),
        "sums": torch.full((capacity, heads, 2), float("nan")),
    }
    tensors = dict(q=q, out=out, cache=cache, query_start=starts, seq_lens=seq_lens)
    tensors |= dict(block_table=table, **memory)
    strides = (stride * cache.element_size() for stride in cache.stride()[:3])
    arguments = Arguments(
        *(tensors[name].data_ptr() for name in POINTERS),
        q.stride(0),
        out.stride(0),
        *strides,
        table.stride(0),
        requests,
        len(q),
        kv_heads,
        heads // kv_heads,
        case.page_size,
        case.window,
        capacity,
        case.blocks,
        dim**-0.5 * LOG2_E,
        case.soft_cap,
    )
    library().plan(ctypes.byref(arguments), case.schedule)
    library().attention(
        dim, code_of(case.dtype), code_of(cache.dtype), ctypes.byref(arguments), case.schedule
    )


@pytest.mark.parametrize(("dim", "dtype", "cache_dtype"), FORMATS)
def test_formats(dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    run(
        Case(
            lengths=RAGGED_LENGTHS["decode"],
            heads=(9, 3, dim),
            page_size=16,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
    )


@pytest.mark.parametrize("heads", [(1, 1, 64), (8, 2, 64), (16, 1, 64), (24, 2, 128)])
def test_groups(heads: tuple[int, int, int]) -> None:
    run(Case(lengths=((1, 100), (1, 600)), heads=heads, page_size=32))


@pytest.mark.parametrize("page_size", [16, 48, 1024])
def test_page_sizes(page_size: int) -> None:
    run(Case(page_size=page_size, cache_dtype=torch.int8))


@pytest.mark.parametrize("window", [1, 60, 64, 100, 513, 700])
def test_windows(window: int) -> None:
    run(Case(window=window))


def test_windows_and_soft_caps_of_8_bits() -> None:
    run(Case(window=100, cache_dtype=torch.int8))
    run(Case(window=600, soft_cap=5.0, dtype=torch.float16, cache_dtype=torch.float8_e4m3fn))


def test_requests_of_other_query_lengths_are_left_to_others() -> None:
    run(Case(lengths=((1, 1300), (0, 0), (3, 40), (1, 600), (1, 512), (1, 513), (2, 2))))
    run(Case(lengths=((0, 0), (3, 40))))


def test_no_schedule_changes_a_bit() -> None:
    expected = run(Case())
    for schedule in SCHEDULES:
        for capacity in (64, 0):
            rows = run(Case(schedule=schedule, capacity=capacity))
            assert all(map(torch.equal, rows, expected)), (schedule, capacity)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_neither_splits_nor_blocks_nor_company_change_a_bit(cache_dtype: torch.dtype) -> None:
    expected = run(Case(cache_dtype=cache_dtype))
    for capacity, blocks in ((0, 3), (3, 1), (4, 7), (5, 2)):
        rows = run(Case(cache_dtype=cache_dtype, capacity=capacity, blocks=blocks))
        assert all(map(torch.equal, rows, expected)), (capacity, blocks)
    for request, row in enumerate(expected):
        (alone,) = run(Case(cache_dtype=cache_dtype, alone=request))
        assert torch.equal(alone, row)


def test_many_chunks_are_folded_as_by_one_block() -> None:
    case = Case(lengths=((1, 4700), (1, 9)), heads=(1, 1, 64))
    assert all(map(torch.equal, run(case), run(replace(case, capacity=0))))


@pytest.mark.parametrize("schedule", [0, 6, 7])
def test_more_requests_than_a_block_plans_at_once(schedule: int) -> None:
    lengths = [(1, 1 + 7 * i % 40) if i % 9 == 0 else (0, 5) for i in range(300)]
    run(Case(lengths=[(1, 700), *lengths, (1, 700)], heads=(1, 1, 64), schedule=schedule))


@pytest.mark.parametrize(("dim", "dtype", "cache_dtype"), FORMATS)
def test_shared_memory(dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Every group fits sm_80, and two blocks of groups up to 4 a multiprocessor of sm_90."""
    code = 1 if cache_dtype.itemsize == 2 else 3
    bytes_of = library().shared_memory_of_attention
    assert all(bytes_of(dim, code, group) <= SHARED_LIMIT for group in range(1, 17))
    assert bytes_of(dim, code, 4) + 1024 <= (228 << 10) // 2


class Calls:
    """Stands for the CUDA kernel and for the other one; rows a kernel owns get its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, triton: bool = True) -> None:
        self.refuses = False
        monkeypatch.setattr(cuda_attention, "decode", self.decode)
        monkeypatch.setattr(cuda_attention, "other", lambda stem, op: self.attend)
        monkeypatch.setattr(cuda_attention, "takes_others", lambda: triton)

    def decode(self, q, cache, metadata, scale, window, cap, out):
        if self.refuses:
            raise RuntimeError("this shape is not taken")
        out[self._rows(metadata, lambda n: n == 1)] = 1

    def attend(self, q, cache, metadata, scale, window, cap, out, *, skip_decodes=False):
        out[self._rows(metadata, lambda n: n > 1 or not skip_decodes)] = 2

    @staticmethod
    def _rows(metadata, owns) -> list[int]:
        starts = metadata.query_start_loc.tolist()
        spans = zip(starts, starts[1:], strict=False)
        return [row for a, b in spans if owns(b - a) for row in range(a, b)]


@pytest.mark.parametrize("known", [True, False], ids=["known", "captured"])
@pytest.mark.parametrize("triton", [True, False], ids=["triton", "reference"])
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([(1, 9), (0, 0), (1, 300)], [1, 1]),
        ([(1, 9), (2, 5), (1, 300)], [1, 2, 2, 1]),
        ([(3, 9), (2, 5)], [2] * 5),
    ],
    ids=["decodes", "mixed", "prompts"],
)
def test_each_request_is_one_kernels(
    lengths, expected, triton, known, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a captured graph, too, where the host knows nothing; but the reference takes all."""
    Calls(monkeypatch, triton=triton)
    metadata = ragged_batch(lengths, 64, rng).metadata()
    if not known:
        metadata = replace(metadata, query_lens=np.zeros(0, np.int32))
    if not triton and (2 in expected or not known):
        expected = [2] * len(expected)
    q = torch.zeros(len(expected), 1, 64)
    out = torch.zeros_like(q)
    cuda_attention.paged_attention(q, q, metadata, 1.0, None, None, out)
    assert out[:, 0, 0].tolist() == expected


def test_what_the_kernel_refuses_goes_elsewhere(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    Calls(monkeypatch).refuses = True
    out = torch.zeros(4, 1, 64)
    metadata = ragged_batch([(1, 9), (2, 5), (1, 300)], 64, rng).metadata()
    cuda_attention.paged_attention(out, out, metadata, 1.0, None, None, out)
    assert out[:, 0, 0].tolist() == [2, 2, 2, 2]
