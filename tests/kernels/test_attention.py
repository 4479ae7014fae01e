from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace_kernels.kv_format import values_and_scales, write_tokens
from headrace_kernels.ops.attention import AttentionMetadata, paged_attention
from headrace_kernels.reference import attention_plan
from headrace_kernels.testing import (
    HEAD_SHAPES,
    RAGGED_LENGTHS,
    TOLERANCES,
    RaggedBatch,
    Tolerance,
    assert_close,
    expected_attention,
    poisoned,
    ragged_batch,
    random_cache,
)

pytestmark = pytest.mark.usefixtures("implementation")


def forget_other_slots(cache: Tensor, batch: RaggedBatch) -> None:
    """NaN wherever no request has a token."""
    used = torch.zeros(batch.num_blocks * batch.page_size, dtype=torch.bool)
    for request in range(len(batch.query_lens)):
        used[batch.slots_of(request)] = True
    unused = ~used.view(batch.num_blocks, batch.page_size)
    values, scales = values_and_scales(cache)
    if scales is None:
        values.masked_fill_(unused[:, None, None, :, None], float("nan"))
    else:
        scales.masked_fill_(unused[:, None, None, :], float("nan"))


def run(
    q: Tensor,
    cache: Tensor,
    batch: RaggedBatch,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    out = poisoned(*q.shape, dtype=q.dtype)
    scale = q.shape[-1] ** -0.5
    return paged_attention(q, cache, batch.metadata(), scale, window, soft_cap, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("heads", HEAD_SHAPES)
@pytest.mark.parametrize("lengths", RAGGED_LENGTHS.values(), ids=RAGGED_LENGTHS.keys())
def test_ragged_batches(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    num_heads, kv_heads, dim = heads
    batch = ragged_batch(lengths, page_size, rng)
    cache = random_cache(batch.num_blocks, kv_heads, page_size, dim, dtype=dtype)
    forget_other_slots(cache, batch)
    q = torch.randn(batch.num_rows, num_heads, dim).to(dtype)
    out = run(q, cache, batch)
    assert_close(out, expected_attention(q, cache, batch), TOLERANCES["attention", dtype])


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "page_size"),
    [
        (torch.float32, torch.int8, 16),
        (torch.bfloat16, torch.int8, 64),
        (torch.float32, torch.float8_e4m3fn, 64),
    ],
)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("heads", HEAD_SHAPES)
def test_an_8_bit_cache(
    heads: tuple[int, int, int],
    window: int | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    page_size: int,
    rng: np.random.Generator,
) -> None:
    """The oracle gets what was stored: only the arithmetic on it is tested here."""
    num_heads, kv_heads, dim = heads
    lengths = [*RAGGED_LENGTHS["mixed"], *RAGGED_LENGTHS["tile borders"], (0, 9)]
    batch = ragged_batch(lengths, page_size, rng)
    cache = random_cache(batch.num_blocks, kv_heads, page_size, dim, dtype=kv_dtype)
    forget_other_slots(cache, batch)
    q = torch.randn(batch.num_rows, num_heads, dim).to(dtype)
    out = run(q, cache, batch, window)
    assert_close(out, expected_attention(q, cache, batch, window), TOLERANCES["attention", dtype])


@pytest.mark.parametrize("window", [1, 15, 64, 70, 1000])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_sliding_window_and_soft_cap(
    window: int, soft_cap: float | None, rng: np.random.Generator
) -> None:
    batch = ragged_batch(RAGGED_LENGTHS["mixed"], 16, rng)
    cache = random_cache(batch.num_blocks, 2, 16, 32)
    forget_other_slots(cache, batch)
    q = torch.randn(batch.num_rows, 6, 32)
    out = run(q, cache, batch, window, soft_cap)
    expected = expected_attention(q, cache, batch, window, soft_cap)
    assert_close(out, expected, TOLERANCES["attention", torch.float32])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(
        st.integers(1, 150).flatmap(lambda seq: st.tuples(st.integers(1, seq), st.just(seq))),
        min_size=1,
        max_size=5,
    ),
    window=st.none() | st.integers(1, 160),
)
def test_any_lengths(lengths: list[tuple[int, int]], window: int | None) -> None:
    batch = ragged_batch(lengths, 16, np.random.default_rng(1))
    cache = random_cache(batch.num_blocks, 1, 16, 16)
    forget_other_slots(cache, batch)
    q = torch.randn(batch.num_rows, 2, 16)
    expected = expected_attention(q, cache, batch, window)
    assert_close(run(q, cache, batch, window), expected, TOLERANCES["attention", torch.float32])


def test_large_scores_do_not_overflow(rng: np.random.Generator) -> None:
    batch = ragged_batch(RAGGED_LENGTHS["mixed"], 16, rng)
    cache = random_cache(batch.num_blocks, 1, 16, 16)
    cache[:, 0] *= 1e3
    q = torch.randn(batch.num_rows, 1, 16)
    expected = expected_attention(q, cache, batch)
    tolerance = Tolerance(1e-3, 1e-3, "scores of thousands have an fp32 spacing of 2e-4")
    assert_close(run(q, cache, batch), expected, tolerance)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 4, 16)])
def test_a_row_depends_on_its_request_only(
    heads: tuple[int, int, int],
    kv_dtype: torch.dtype,
    window: int | None,
    threads: int,
    rng: np.random.Generator,
) -> None:
    """One request alone, in chunks, token by token, and beside others: equal bits."""
    num_heads, kv_heads, dim = heads
    length = 150
    q_all, kv_all = torch.randn(length, num_heads, dim), torch.randn(length, 2, kv_heads, dim)

    def attend(first: int, last: int, before: Sequence[tuple[int, int]] = ()) -> Tensor:
        batch = ragged_batch([*before, (last - first, last), (1, 33)], 16, rng)
        cache = random_cache(batch.num_blocks, kv_heads, 16, dim, dtype=kv_dtype)
        slots = batch.slots_of(len(before))
        write_tokens(cache, torch.from_numpy(slots), kv_all[:last])
        q = torch.randn(batch.num_rows, num_heads, dim)
        begin = sum(query for query, _ in before)
        q[begin : begin + last - first] = q_all[first:last]
        return run(q, cache, batch, window)[begin : begin + last - first]

    whole = attend(0, length)
    others = [(1, 400), (40, 40), (1, 5), (13, 99)]
    assert torch.equal(attend(0, length, others), whole)
    for chunk in (1, 7, 64, 100):
        parts = [
            attend(first, min(first + chunk, length), others if first % 3 else [])
            for first in range(0, length, chunk)
        ]
        assert torch.equal(torch.cat(parts), whole), f"chunks of {chunk}"


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_scratch_limits_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    batch = ragged_batch(RAGGED_LENGTHS["mixed"], 16, rng)
    cache = random_cache(batch.num_blocks, 3, 16, 32)
    forget_other_slots(cache, batch)
    q = torch.randn(batch.num_rows, 9, 32)
    whole = run(q, cache, batch)
    monkeypatch.setattr(attention_plan, "DECODE_SCRATCH_BYTES", 1 << 16)
    monkeypatch.setattr(attention_plan, "PREFILL_SCRATCH_BYTES", 1 << 14)
    assert torch.equal(run(q, cache, batch), whole)


def test_metadata_does_not_follow_the_arrays_it_was_built_from() -> None:
    lengths, table, slots = np.array([2]), np.array([[3]]), np.array([48, 49])
    metadata = AttentionMetadata.build(lengths, lengths, table, slots, "cpu")
    lengths += 1
    table += 1
    slots += 1
    assert metadata.seq_lens.tolist() == [2]
    assert metadata.block_table.tolist() == [[3]]
    assert metadata.slot_mapping.tolist() == [48, 49]
    assert metadata.query_start_loc.tolist() == [0, 2]


def test_wrong_arguments_are_named(rng: np.random.Generator) -> None:
    batch = ragged_batch([(8, 8)], 16, rng)
    metadata, q = batch.metadata(), torch.randn(8, 4, 16)
    cache = torch.zeros(batch.num_blocks, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="4 heads of q cannot share 3 heads"):
        paged_attention(q, cache, metadata, 1.0)
    with pytest.raises(ValueError, match="sliding_window must be at least 1, not 0"):
        paged_attention(q, cache[:, :, :2], metadata, 1.0, sliding_window=0)
    with pytest.raises(ValueError, match="slot_mapping must have shape"):
        paged_attention(q[:4], cache[:, :, :2], metadata, 1.0)
