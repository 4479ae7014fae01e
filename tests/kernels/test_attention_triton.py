"""Triton's paged attention, interpreted: against the oracle, and to the bit against itself."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.kv_format import from_pages, row_size, write_tokens
from headrace_kernels.testing import (
    RAGGED_LENGTHS,
    TOLERANCES,
    RaggedBatch,
    Tolerance,
    assert_close,
    expected_attention,
    naive_attention,
    poisoned,
    ragged_batch,
)

triton = pytest.importorskip("triton")
attention = importlib.import_module("headrace_kernels.triton.attention")
attention_work = importlib.import_module("headrace_kernels.triton.attention_work")

TOLERANCE = {
    torch.float32: TOLERANCES["attention", torch.float32],
    torch.float16: Tolerance(2e-3, 2**-9, "weights and output are rounded to 11 bits"),
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two tiles, and little to fold: the interpreter takes milliseconds for either."""
    monkeypatch.setattr(attention, "CHUNK", 128)
    monkeypatch.setattr(attention_work, "MAX_SPLIT_BLOCKS", triton.language.constexpr(1))


def empty_cache(blocks: int, kv_heads: int, page: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The middle layer of three, of NaN: values of 8 bits have scales of NaN then."""
    whole = torch.empty((blocks, 3, 2, kv_heads, page, row_size(dim, dtype)), dtype=dtype)
    whole.view(torch.uint8).fill_(255)
    return whole[:, 1]


def filled_cache(
    batch: RaggedBatch, kv_heads: int, dim: int, dtype: torch.dtype, tokens: Sequence[Tensor] = ()
) -> Tensor:
    """A cache that holds the tokens of each request, drawn unless given, and NaN elsewhere."""
    cache = empty_cache(batch.num_blocks, kv_heads, batch.page_size, dim, dtype)
    for request, length in enumerate(batch.seq_lens.tolist()):
        drawn = torch.randn(length, 2, kv_heads, dim)
        given = tokens[request] if request < len(tokens) else drawn
        write_tokens(cache, torch.from_numpy(batch.slots_of(request)), given[:length])
    return cache


def run(
    q: Tensor,
    cache: Tensor,
    batch: RaggedBatch,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    out = poisoned(*q.shape, dtype=q.dtype)
    scale = q.shape[-1] ** -0.5
    attention.paged_attention(q, cache, batch.metadata(), scale, window, soft_cap, out)
    return out


def check(
    lengths: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    rng: np.random.Generator,
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    batch = ragged_batch(lengths, page_size, rng)
    cache = filled_cache(batch, heads[1], heads[2], kv_dtype or dtype)
    q = torch.randn(batch.num_rows, heads[0], heads[2]).to(dtype)
    out = run(q, cache, batch, window, soft_cap)
    assert_close(out, expected_attention(q, cache, batch, window, soft_cap), TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", RAGGED_LENGTHS.values(), ids=RAGGED_LENGTHS.keys())
def test_ragged_batches(lengths: list[tuple[int, int]], rng: np.random.Generator) -> None:
    check(lengths, (2, 1, 32), rng)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((9, 3, 64), torch.float16),
        ((4, 4, 16), torch.float32),
        ((8, 1, 32), torch.float16),
        ((6, 2, 80), torch.float32),
    ],
)
def test_heads_and_pages(
    heads: tuple[int, int, int], dtype: torch.dtype, page_size: int, rng: np.random.Generator
) -> None:
    check([(1, 90), (9, 70), (1, 1), (0, 5)], heads, rng, page_size, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("page_size", "dim"), [(16, 32), (64, 32), (64, 80)])
def test_eight_bit_caches(
    page_size: int,
    dim: int,
    kv_dtype: torch.dtype,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    """The oracle gets what was stored: only the arithmetic on it is tested here."""
    check([(1, 150), (9, 70), (2, 2)], (2, 1, dim), rng, page_size, dtype, kv_dtype)


@pytest.mark.parametrize(
    ("window", "soft_cap"),
    [(1, None), (64, 2.0), (70, None), (150, 2.0), (1000, None), (None, 2.0)],
)
def test_sliding_window_and_soft_cap(
    window: int | None, soft_cap: float | None, rng: np.random.Generator
) -> None:
    """Of a split decode, of prefills over chunks and of one that a window puts behind tiles."""
    lengths = [(1, 260), (40, 140), (3, 3)]
    check(lengths, (2, 1, 16), rng, window=window, soft_cap=soft_cap)


@pytest.mark.usefixtures("ascending_dots")
@pytest.mark.parametrize(
    ("kv_dtype", "window", "page_size"),
    [(torch.float32, 40, 16), (torch.int8, None, 64)],
)
def test_a_row_depends_on_its_request_only(
    kv_dtype: torch.dtype,
    window: int | None,
    page_size: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, beside others, decoded, in three chunkings, split or not: equal bits."""
    length, heads = 80, (2, 1, 16)
    monkeypatch.setattr(attention, "CHUNK", 64)
    tokens = torch.randn(length, 2, heads[1], heads[2])
    q_all = torch.randn(length, heads[0], heads[2])

    def attend(first: int, last: int, others: Sequence[tuple[int, int]] = ()) -> Tensor:
        batch = ragged_batch([(last - first, last), *others], page_size, rng)
        cache = filled_cache(batch, heads[1], heads[2], kv_dtype, [tokens])
        q = torch.randn(batch.num_rows, heads[0], heads[2])
        q[: last - first] = q_all[first:last]
        return run(q, cache, batch, window)[: last - first]

    whole = attend(0, length)
    assert whole.isfinite().all()
    assert torch.equal(attend(0, length, [(1, 70)]), whole)
    assert torch.equal(attend(length - 1, length), whole[-1:])
    for borders in ((0, 7, length), (0, 64, length), (0, 30, 65, length)):
        parts = [attend(*part) for part in zip(borders, borders[1:], strict=False)]
        assert torch.equal(torch.cat(parts), whole), f"borders {borders}"
    for partial_bytes in (0, 600):
        monkeypatch.setattr(attention_work, "PARTIAL_BYTES", partial_bytes)
        decoded = attend(length - 1, length, [(3, 70)])
        assert torch.equal(decoded, whole[-1:]), f"{partial_bytes} bytes of partials"
    monkeypatch.setattr(attention_work, "MAX_SPLIT_BLOCKS", triton.language.constexpr(16))
    monkeypatch.setattr(attention_work, "PARTIAL_BYTES", 1 << 20)
    assert torch.equal(attend(46, length), whole[46:]), "a prefill of two blocks, split"


def test_the_work_list_covers_every_row_once(rng: np.random.Generator) -> None:
    """Items of the last block of a request first, unsplit ones before all; chunks ascend."""
    batch = ragged_batch([(1, 300), (200, 200), (0, 9), (2, 600), (1, 128)], 64, rng)
    work = work_list(batch, block_rows=64)
    items, folds, tokens = work.counts.tolist()
    fields = work.items[:items].tolist()
    assert [item[0] for item in fields] == [1] * 7 + [4] + [0] * 3 + [3] * 5
    assert [item[4] for item in fields[:7]] == [6, 5, 4, 3, 2, 1, 0]
    assert [item[5:8] for item in fields[7:]] == [
        [0, 1, -1], [0, 1, 0], [1, 2, 2], [2, 3, 4],
        *([chunk, chunk + 1, 6 + 4 * chunk] for chunk in range(5)),
    ]  # fmt: skip
    assert work.folds[:folds].tolist() == [[0, 0, 2, 3], [201, 6, 4, 5], [202, 8, 4, 5]]
    assert tokens == 204


def work_list(batch: RaggedBatch, block_rows: int) -> attention_work.WorkList:
    return attention_work.make_work_list(
        batch.metadata(),
        num_tokens=batch.num_rows,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        page_size=batch.page_size,
        block_rows=block_rows,
        chunk=128,
        programs=3,
        sliding_window=None,
    )


@pytest.mark.parametrize("strided", [False, True])
def test_decodes_may_be_left_to_another_kernel(strided: bool, rng: np.random.Generator) -> None:
    """Their rows stay as they are; the others have the bits that they have beside decodes."""
    batch = ragged_batch([(1, 300), (5, 40), (1, 1), (0, 9), (2, 600), (1, 70)], 64, rng, pad_to=16)
    cache = filled_cache(batch, 1, 16, torch.float32)
    q = torch.randn(16, 2, 16)
    out = poisoned(16, 16, 2).transpose(1, 2) if strided else poisoned(16, 2, 16)
    before = out.clone()
    attention.paged_attention(q, cache, batch.metadata(), 0.25, None, None, out, skip_decodes=True)
    rows = [0, 6, 9]
    others = [row for row in range(16) if row not in rows]
    assert torch.equal(out[rows].view(torch.int32), before[rows].view(torch.int32))
    assert torch.equal(out[others], run(q, cache, batch)[others])


def test_a_work_list_of_many_requests(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a program looks at a time, most of them empty."""
    monkeypatch.setattr(attention_work, "REQUESTS", triton.language.constexpr(4))
    lengths = [(0, 2**31 - 1)] * 11
    lengths[3], lengths[6], lengths[10] = (1, 200), (70, 70), (1, 300)
    batch = ragged_batch([lengths[3], lengths[6], lengths[10]], 64, rng)
    table = np.zeros((11, batch.block_table.shape[1]), dtype=np.int64)
    query_lens, seq_lens = np.array(lengths).T
    work = work_list(
        replace(batch, query_lens=query_lens, seq_lens=seq_lens, block_table=table), block_rows=64
    )
    items, folds, _ = work.counts.tolist()
    assert work.items[:items, 0].tolist() == [6] * 3 + [3] * 2 + [10] * 3
    assert work.folds[:folds, :2].tolist() == [[0, 0], [71, 4]]


def test_replays_follow_the_device(rng: np.random.Generator) -> None:
    """The kernels of a captured graph read lengths from the device: the host's are stale."""
    first = ragged_batch([(1, 200), (5, 20), (0, 0)], 64, rng, pad_to=16)
    second = ragged_batch([(3, 3), (1, 140), (4, 199)], 64, rng, pad_to=16)
    stale, fresh = first.metadata(), second.metadata()
    for name in ("query_start_loc", "seq_lens", "block_table"):
        getattr(stale, name).copy_(getattr(fresh, name))
    cache = filled_cache(second, 1, 16, torch.float32)
    q, out = torch.randn(16, 2, 16), poisoned(16, 2, 16)
    attention.paged_attention(q, cache, stale, 0.25, None, None, out)
    assert torch.equal(out, run(q, cache, second))


def test_rows_may_lie_apart(rng: np.random.Generator) -> None:
    """q inside the output of a projection, out inside something wider; or rows of any stride."""
    batch = ragged_batch([(3, 20), (1, 5)], 64, rng)
    cache = filled_cache(batch, 2, 32, torch.float32)
    wide_q, wide_out = torch.randn(batch.num_rows, 200), poisoned(batch.num_rows, 150)
    q, out = wide_q[:, 8:136].view(-1, 4, 32), wide_out[:, :128].view(-1, 4, 32)
    attention.paged_attention(q, cache, batch.metadata(), 32**-0.5, None, None, out)
    assert torch.equal(out, run(q.contiguous(), cache, batch))
    assert (out[4:] == 0).all()
    assert wide_out[:, 128:].isnan().all()
    turned = q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(run(turned, cache, batch), out)


def test_nan_stays_in_its_row(rng: np.random.Generator) -> None:
    batch = ragged_batch([(2, 100), (1, 300)], 64, rng)
    cache = filled_cache(batch, 1, 16, torch.float32)
    q = torch.randn(batch.num_rows, 2, 16)
    clean = run(q, cache, batch)
    q[1, 1, 5] = float("nan")
    out = run(q, cache, batch)
    assert out[1, 1].isnan().all()
    out[1, 1] = clean[1, 1]
    assert torch.equal(out, clean)


@pytest.mark.parametrize(("page_size", "kv_dtype"), [(16, torch.float16), (64, torch.int8)])
def test_offsets_beyond_32_bits(
    page_size: int, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of 2^31 elements and a few pages, of which the last pages are touched."""
    executor = triton.runtime.interpreter.GridExecutor
    # The interpreter works on the storage itself here; copying it back would touch all of it.
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *arguments: None)
    dim = 256
    size = 2 * page_size * row_size(dim, kv_dtype)
    blocks = 2**31 // size + 4
    cache = torch.empty((blocks, 2, 1, page_size, row_size(dim, kv_dtype)), dtype=kv_dtype)
    table = np.array([[blocks - 1, blocks - 3]])
    lengths = np.array([1]), np.array([page_size + 4])
    batch = RaggedBatch(*lengths, table, np.array([-1]), np.array([0]), blocks, page_size)
    tokens = torch.randn(page_size + 4, 2, 1, dim)
    write_tokens(cache, torch.from_numpy(batch.slots_of(0)), tokens)
    q = torch.randn(1, 1, dim).half()
    stored = from_pages(cache[torch.from_numpy(table[0])])
    keys, values = stored.permute(1, 0, 3, 2, 4).reshape(2, -1, 1, dim)[:, : page_size + 4]
    wanted = naive_attention(q, keys, values, dim**-0.5)
    assert_close(run(q, cache, batch), wanted, TOLERANCE[torch.float16])


def test_refusals(rng: np.random.Generator) -> None:
    facts = KernelFacts(
        device="cuda", arch="sm_90", dtype=torch.bfloat16, head_dim=128, page_size=64
    )
    assert attention.declines(facts) is None
    assert "not torch.int8" in attention.declines(replace(facts, dtype=torch.int8))
    assert "16 to 256, not 512" in attention.declines(replace(facts, head_dim=512))
    batch = ragged_batch([(1, 1)], 64, rng)
    cache, q = filled_cache(batch, 1, 16, torch.float32), torch.zeros(8, 1, 16)
    with pytest.raises(ValueError, match="scale must be positive, not 0"):
        attention.paged_attention(q, cache, batch.metadata(), 0.0, None, None, q)
