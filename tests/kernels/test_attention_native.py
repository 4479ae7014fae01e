"""What the C++ kernel promises beyond tests/kernels/test_attention.py: splits, types, refusals."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace_kernels import native
from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.kv_format import from_pages, row_size, to_pages, write_tokens
from headrace_kernels.testing import (
    TOLERANCES,
    RaggedBatch,
    assert_close,
    expected_attention,
    naive_attention,
    poisoned,
    ragged_batch,
    random_cache,
)

if (REASON := native.missing("paged_attention")) is not None:
    pytest.skip(f"native kernels: {REASON}", allow_module_level=True)
cpu_attention = importlib.import_module("headrace_kernels.cpu.attention")

LONG = [(1, 1500), (1, 700), (3, 900), (70, 600), (1, 256), (1, 257), (1, 30)]
"""Contexts of up to six splits of 256 tokens."""


def run(q: Tensor, cache: Tensor, batch: RaggedBatch, window: int | None = None) -> Tensor:
    out = poisoned(*q.shape, dtype=q.dtype)
    scale = q.shape[-1] ** -0.5
    cpu_attention.paged_attention(q, cache, batch.metadata(), scale, window, None, out)
    return out


@pytest.mark.parametrize("window", [None, 333])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.int8),
    ],
)
def test_splits_and_threads_change_no_bit(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    window: int | None,
    isa: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = ragged_batch(LONG, 16, rng)
    cache = random_cache(batch.num_blocks, 3, 16, 32, dtype=kv_dtype)
    q = torch.randn(batch.num_rows, 9, 32).to(dtype)
    before = native.num_threads()
    # Exactly as much as it asks for: memory that is kept would be larger.
    monkeypatch.setattr(
        cpu_attention, "scratch", lambda op, nbytes: torch.empty(nbytes, dtype=torch.uint8)
    )
    try:
        native.set_num_threads(1)
        whole = run(q, cache, batch, window)
        assert_close(
            whole, expected_attention(q, cache, batch, window), TOLERANCES["attention", dtype]
        )
        for threads in (2, 3, 16):
            native.set_num_threads(threads)
            for partial_bytes in (0, 20_000, 16 << 20):
                monkeypatch.setattr(cpu_attention, "PARTIAL_BYTES", partial_bytes)
                assert torch.equal(run(q, cache, batch, window), whole)
    finally:
        native.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
    ],
)
@pytest.mark.parametrize("window", [None, 300])
def test_a_decode_is_the_last_row_of_a_prefill(
    window: int | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    isa: str,
    threads: int,
    rng: np.random.Generator,
) -> None:
    """Past several splits, and with blocks of rows that begin elsewhere."""
    length, heads = 1000, (6, 2, 64)
    q_all = torch.randn(length, heads[0], heads[2]).to(dtype)
    kv_all = torch.randn(length, 2, heads[1], heads[2])

    def attend(first: int, last: int, before: Sequence[tuple[int, int]]) -> Tensor:
        batch = ragged_batch([*before, (last - first, last)], 16, rng)
        cache = random_cache(batch.num_blocks, heads[1], 16, heads[2], dtype=kv_dtype)
        slots = batch.slots_of(len(before))
        write_tokens(cache, torch.from_numpy(slots), kv_all[:last])
        q = torch.randn(batch.num_rows, heads[0], heads[2]).to(dtype)
        begin = sum(query for query, _ in before)
        q[begin : begin + last - first] = q_all[first:last]
        return run(q, cache, batch, window)[begin : begin + last - first]

    whole = attend(0, length, [])
    assert torch.equal(attend(length - 1, length, []), whole[-1:])
    assert torch.equal(attend(length - 1, length, [(1, 77), (5, 500)]), whole[-1:])
    assert torch.equal(attend(599, 768, [(2, 3)]), whole[599:768])


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("heads", "page_size"),
    [
        ((2, 1, 48), 1),
        ((2, 2, 112), 5),
        ((4, 2, 128), 128),
        ((71, 1, 64), 16),
        ((3, 1, 192), 32),
        ((2, 1, 256), 16),
    ],
)
def test_head_sizes_page_sizes_and_types(
    heads: tuple[int, int, int],
    page_size: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    isa: str,
    rng: np.random.Generator,
) -> None:
    batch = ragged_batch([(1, 90), (33, 70), (1, 1), (1, 260)], page_size, rng)
    cache = random_cache(batch.num_blocks, heads[1], page_size, heads[2], dtype=kv_dtype)
    q = torch.randn(batch.num_rows, heads[0], heads[2]).to(q_dtype)
    expected = expected_attention(q, cache, batch, None)
    assert_close(run(q, cache, batch), expected, TOLERANCES["attention", q_dtype])


def test_rows_may_lie_apart(isa: str, rng: np.random.Generator) -> None:
    """q inside the output of a projection, out inside something wider, and their padding."""
    batch = ragged_batch([(3, 20), (1, 5)], 16, rng)
    cache = random_cache(batch.num_blocks, 2, 16, 32)
    wide_q, wide_out = torch.randn(batch.num_rows, 200), poisoned(batch.num_rows, 150)
    q = wide_q[:, 8:136].view(-1, 4, 32)
    out = wide_out[:, :128].view(-1, 4, 32)
    cpu_attention.paged_attention(q, cache, batch.metadata(), 32**-0.5, None, None, out)
    assert torch.equal(out, run(q.contiguous(), cache, batch))
    assert (out[4:] == 0).all()
    assert wide_out[:, 128:].isnan().all()


def test_what_the_kernel_does_not_take_goes_to_the_reference(rng: np.random.Generator) -> None:
    batch = ragged_batch([(3, 20)], 16, rng)
    cache = random_cache(batch.num_blocks, 2, 16, 32)
    q = torch.randn(32, 4, batch.num_rows).permute(2, 1, 0)
    tolerance = TOLERANCES["attention", torch.float32]
    assert_close(run(q, cache, batch), expected_attention(q, cache, batch, None), tolerance)
    out = poisoned(*q.shape, dtype=torch.float64)
    cpu_attention.paged_attention(q, cache, batch.metadata(), 32**-0.5, None, None, out)
    assert_close(out, expected_attention(q, cache, batch, None), tolerance)


def test_nan_stays_in_its_request(isa: str, rng: np.random.Generator) -> None:
    batch = ragged_batch([(2, 100), (2, 100), (1, 70)], 16, rng)
    cache = random_cache(batch.num_blocks, 2, 16, 32)
    q = torch.randn(batch.num_rows, 4, 32)
    clean = run(q, cache, batch)
    q[2, 1, 5] = float("nan")
    out = run(q, cache, batch)
    assert out[2, 1].isnan().all()
    out[2, 1] = clean[2, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8])
def test_offsets_beyond_32_bits(kv_dtype: torch.dtype, isa: str) -> None:
    """A cache of 2^31 elements and a few pages, of which the last pages are touched."""
    dim, page = 256, 16
    blocks = 2**31 // (2 * page * dim) + 4
    cache = torch.empty((blocks, 2, 1, page, row_size(dim, kv_dtype)), dtype=kv_dtype)
    last = torch.tensor([blocks - 1, blocks - 3])
    cache[last] = to_pages(torch.randn(2, 2, 1, page, dim), kv_dtype)
    table = last[None].numpy()
    lengths = np.array([1]), np.array([20])
    batch = RaggedBatch(*lengths, table, np.array([-1]), np.array([19]), blocks, page)
    q = torch.randn(1, 2, dim).bfloat16()
    stored = from_pages(cache[last])
    keys, values = stored.permute(1, 0, 3, 2, 4).reshape(2, 32, 1, dim)[:, :20]
    expected = naive_attention(q, keys, values, dim**-0.5)
    assert_close(run(q, cache, batch), expected, TOLERANCES["attention", torch.bfloat16])


def test_requests_of_no_rows_may_have_any_length_and_block(
    isa: str, threads: int, rng: np.random.Generator
) -> None:
    """The padding of a recorded batch: alone, and around a context of several splits."""
    batch = ragged_batch([(1, 700), (5, 20)], 16, rng)
    arguments = op_arguments(batch)
    q, cache, table, out = arguments[0], arguments[1], arguments[4], arguments[-1]
    torch.ops.headrace.paged_attention(*arguments)
    padded_out, scratch = poisoned(*q.shape), torch.empty(1 << 20, dtype=torch.uint8)
    padded_table = torch.full((5, table.shape[1]), 2**30, dtype=torch.int32)
    padded_table[torch.tensor([1, 3])] = table
    torch.ops.headrace.paged_attention(
        q, cache, int32(0, 0, 1, 1, 6, 6), int32(2**31 - 1, 700, -(2**31), 20, 0), padded_table,
        *arguments[5:8], scratch, padded_out,
    )  # fmt: skip
    assert torch.equal(padded_out, out)
    torch.ops.headrace.paged_attention(
        q, cache, int32(0, 0), int32(5), padded_table[:1], *arguments[5:8], scratch, padded_out
    )
    assert (padded_out == 0).all()


def op_arguments(batch: RaggedBatch, **changes: Any) -> tuple[Any, ...]:
    metadata = batch.metadata()
    arguments = {
        "q": torch.randn(batch.num_rows, 4, 32),
        "kv_cache": torch.randn(batch.num_blocks, 2, 2, 16, 32),
        "query_start_loc": metadata.query_start_loc,
        "seq_lens": metadata.seq_lens,
        "block_table": metadata.block_table,
        "scale": 32**-0.5,
        "sliding_window": 0,
        "soft_cap": 0.0,
        "scratch": torch.empty(1 << 16, dtype=torch.uint8),
        "out": torch.empty(batch.num_rows, 4, 32),
    }
    assert changes.keys() <= arguments.keys()
    return tuple((arguments | changes).values())


def test_opcheck(rng: np.random.Generator) -> None:
    batch = ragged_batch([(1, 90), (5, 5)], 16, rng)
    torch.library.opcheck(torch.ops.headrace.paged_attention.default, op_arguments(batch))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(8, 4, 32).half()}, "q must be bfloat16 or float32"),
        ({"q": torch.zeros(8, 32, 4).transpose(1, 2)}, "q must have contiguous rows"),
        ({"out": torch.zeros(8, 4, 16)}, "out must have the shape and the dtype of q"),
        ({"kv_cache": torch.zeros(9, 2, 2, 16, 16)}, "kv_cache must be"),
        ({"kv_cache": torch.zeros(9, 2, 2, 16, 32, dtype=torch.int8)}, "kv_cache must be"),
        ({"kv_cache": torch.zeros(9, 2, 2, 16, 36)}, "kv_cache must be"),
        ({"kv_cache": torch.zeros(9, 2, 3, 16, 32)}, "4 heads of q cannot share 3 heads"),
        ({"seq_lens": torch.tensor([90, 5])}, "seq_lens must be int32"),
        ({"seq_lens": int32(90)}, "disagree on the requests"),
        ({"seq_lens": int32(90, 4)}, "request 1 has rows 1 to 6 of 8 and a sequence of 4"),
        ({"seq_lens": int32(900, 5)}, "request 0, 900, is longer than its block table"),
        ({"query_start_loc": int32(0, 1, 9)}, "request 1 has rows 1 to 9 of 8"),
        ({"query_start_loc": int32(1, 2, 3)}, "must begin with 0, not 1"),
        ({"kv_cache": torch.zeros(1, 2, 2, 16, 32)}, "of a cache of 1"),
        ({"sliding_window": -1}, "must not be negative"),
        ({"scratch": torch.empty(100, dtype=torch.uint8)}, "100 bytes, too few for 2 requests"),
        ({"scratch": torch.empty(1 << 16, dtype=torch.uint8)[1:]}, "begin at a multiple of 64"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    batch = ragged_batch([(1, 90), (5, 5)], 16, rng)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.headrace.paged_attention(*op_arguments(batch, **changes))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float16, 64, "takes float32 and bfloat16, not torch.float16"),
        (torch.float32, 72, "takes head sizes up to 256 that are multiples of 16, not 72"),
        (torch.float32, 512, "not 512"),
    ],
)
def test_declines(dtype: torch.dtype, head_dim: int, reason: str) -> None:
    facts = KernelFacts(device="cpu", arch="x86_64", dtype=dtype, head_dim=head_dim, page_size=16)
    assert reason in (cpu_attention.declines(facts) or "")
