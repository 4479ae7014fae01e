from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace_kernels.kv_format import from_pages, quantize, row_size, values_and_scales
from headrace_kernels.ops.rope import rope_and_write_kv
from headrace_kernels.testing import (
    HEAD_SHAPES,
    TOLERANCES,
    assert_close,
    poisoned,
    ragged_batch,
    random_cache,
)

pytestmark = pytest.mark.usefixtures("implementation")

LENGTHS = [(1, 17), (20, 20), (3, 33)]


def table(max_positions: int, rotary_dim: int) -> Tensor:
    frequencies = 100.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / 32)
    angles = torch.arange(max_positions)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


def naive(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotation as a product of complex numbers, in float64. heads: [T, N, D]."""
    half = cos_sin.shape[-1]
    turn = torch.complex(*cos_sin.double()[positions].unbind(1))[:, None]
    pairs = torch.complex(heads[..., :half].double(), heads[..., half : 2 * half].double()) * turn
    return torch.cat((pairs.real, pairs.imag, heads[..., 2 * half :].double()), dim=-1)


def normed(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    heads = heads.double()
    return heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("heads", HEAD_SHAPES)
def test_rotates_and_writes(
    heads: tuple[int, int, int],
    page_size: int,
    qk_norm: bool,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    check_rotates_and_writes(heads, page_size, qk_norm, dtype, rng, LENGTHS)


def check_rotates_and_writes(
    heads: tuple[int, int, int],
    page_size: int,
    qk_norm: bool,
    dtype: torch.dtype,
    rng: np.random.Generator,
    lengths: Sequence[tuple[int, int]],
) -> None:
    num_heads, kv_heads, dim = heads
    batch = ragged_batch(lengths, page_size, rng)
    cache = random_cache(batch.num_blocks, kv_heads, page_size, dim, dtype=dtype)
    before = cache.clone()
    qkv = torch.randn(batch.num_rows, (num_heads + 2 * kv_heads) * dim).to(dtype)
    q_norm, k_norm = (torch.randn(dim), torch.randn(dim)) if qk_norm else (None, None)
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)
    cos_sin = table(64, dim)
    q = rope_and_write_kv(
        qkv,
        positions,
        cos_sin,
        cache,
        slots,
        poisoned(batch.num_rows, num_heads, dim, dtype=dtype),
        q_norm,
        k_norm,
        1e-6,
    )
    by_head = qkv.view(batch.num_rows, -1, dim)
    query, key = by_head[:, :num_heads], by_head[:, num_heads : num_heads + kv_heads]
    value = by_head[:, num_heads + kv_heads :]
    if q_norm is not None and k_norm is not None:
        query, key = normed(query, q_norm, 1e-6), normed(key, k_norm, 1e-6)
    tolerance = TOLERANCES["rope", torch.bfloat16 if dtype == torch.float16 else dtype]
    assert_close(q, naive(query, positions, cos_sin), tolerance)

    used = slots >= 0
    block, offset = slots[used] // page_size, slots[used] % page_size
    expected_key = naive(key, positions, cos_sin)[used]
    assert_close(cache[block, 0, :, offset], expected_key, tolerance)
    assert torch.equal(cache[block, 1, :, offset], value[used])
    cache[block, :, :, offset] = before[block, :, :, offset]
    assert torch.equal(cache, before), "a slot of no token was written"


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_its_own_type(
    dtype: torch.dtype, cache_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    batch = ragged_batch(LENGTHS, 16, rng)
    cache = torch.zeros(batch.num_blocks, 2, 1, 16, 40, dtype=cache_dtype)
    qkv = torch.randn(batch.num_rows, 3 * 40).to(dtype)
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)
    cos_sin = table(64, 40)
    rope_and_write_kv(qkv, positions, cos_sin, cache, slots)
    used = slots >= 0
    block, offset = slots[used] // 16, slots[used] % 16
    key, value = qkv.view(-1, 3, 40)[used, 1], qkv.view(-1, 3, 40)[used, 2]
    rotated = naive(key[:, None], positions[used], cos_sin)[:, 0]
    assert_close(cache[block, 0, 0, offset], rotated, TOLERANCES["rope", cache_dtype])
    assert torch.equal(cache[block, 1, 0, offset], value.to(cache_dtype))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.int8),
        (torch.bfloat16, torch.int8),
        (torch.float32, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("rotary_dim", [0, 32])
def test_rows_of_an_8_bit_cache(
    rotary_dim: int,
    dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    check_8_bit_rows(rotary_dim, dim, dtype, kv_dtype, rng)


def check_8_bit_rows(
    rotary_dim: int,
    dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    batch = ragged_batch(LENGTHS, 16, rng)
    cache = random_cache(batch.num_blocks, 2, 16, dim, dtype=kv_dtype)
    before = from_pages(cache)
    qkv = torch.randn(batch.num_rows, 3 * 2 * dim).to(dtype)
    qkv[3] = 0.0
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)
    cos_sin = table(64, rotary_dim)
    rope_and_write_kv(qkv, positions, cos_sin, cache, slots)
    used = slots >= 0
    block, offset = slots[used] // 16, slots[used] % 16
    _, key, value = qkv.view(-1, 3, 2, dim)[used].unbind(1)
    rows, scales = values_and_scales(cache)
    assert scales is not None
    for side, x in ((0, key), (1, value))[rotary_dim > 0 :]:
        expected_row, expected_scale = quantize(x, kv_dtype)
        assert torch.equal(rows[block, side, :, offset].float(), expected_row.float())
        assert torch.equal(scales[block, side, :, offset], expected_scale)
    rotated = naive(key, positions[used], cos_sin)
    # What rounds to another value in other arithmetic lies between the two. Steps of e4m3 are 32
    # of 448 where they are largest, and an eighth of a value's power of two.
    step = rotated.abs().amax(-1, keepdim=True) / (127 if kv_dtype == torch.int8 else 448 / 32)
    after = from_pages(cache)
    assert ((after[block, 0, :, offset] - rotated).abs() <= 0.5001 * step).all()
    after[block, :, :, offset] = before[block, :, :, offset]
    assert torch.equal(after, before), "a slot of no token was written"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_8_bit_row_keeps_what_is_not_a_number(bad: float, dtype: torch.dtype) -> None:
    cache = torch.zeros(1, 2, 1, 16, 36, dtype=dtype)
    for place in (0, 7, 31):
        qkv = torch.randn(2, 3 * 32)
        qkv[1, 64 + place] = bad
        rope_and_write_kv(qkv, torch.arange(2), table(8, 0), cache, torch.arange(2))
        values = from_pages(cache[0, 1, 0])[:2]
        assert values[0].isfinite().all()
        assert values[1].isnan().all()


@pytest.mark.parametrize("rotary_dim", [0, 8])
def test_values_behind_the_rotary_dimension_stay(rotary_dim: int, rng: np.random.Generator) -> None:
    batch = ragged_batch(LENGTHS, 16, rng)
    cache = random_cache(batch.num_blocks, 1, 16, 32)
    qkv = torch.randn(batch.num_rows, 3 * 32)
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)
    cos_sin = table(64, rotary_dim)
    q = rope_and_write_kv(qkv, positions, cos_sin, cache, slots)
    query = qkv.view(-1, 3, 32)[:, :1]
    assert torch.equal(q[..., rotary_dim:], query[..., rotary_dim:])
    assert_close(q, naive(query, positions, cos_sin), TOLERANCES["rope", torch.float32])


def test_a_row_depends_on_itself_only(threads: int, rng: np.random.Generator) -> None:
    batch = ragged_batch([(200, 200)], 16, rng)
    qkv, norm, cos_sin = torch.randn(batch.num_rows, 15 * 64), torch.randn(64), table(256, 64)
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)

    def run(*borders: int) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(batch.num_blocks, 2, 3, 16, 64)
        parts = []
        for first, last in zip(borders, borders[1:], strict=False):
            rows = slice(first, last)
            parts.append(
                rope_and_write_kv(
                    qkv[rows],
                    positions[rows],
                    cos_sin,
                    cache,
                    slots[rows],
                    q_norm=norm,
                    k_norm=norm,
                    eps=1e-6,
                )
            )
        return torch.cat(parts), cache

    for whole, parts in zip(run(0, 200), run(0, 8, 64, 72, 200), strict=True):
        assert torch.equal(whole, parts)


def test_wrong_arguments_are_named() -> None:
    qkv, cache = torch.randn(8, 5 * 16), torch.zeros(4, 2, 1, 16, 16)
    positions = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="come together"):
        rope_and_write_kv(qkv, positions, table(8, 16), cache, positions, q_norm=torch.ones(16))
    with pytest.raises(ValueError, match="rotates 32 values of heads that have 16"):
        rope_and_write_kv(qkv, positions, table(8, 32), cache, positions)
    with pytest.raises(ValueError, match="does not hold heads of 16"):
        rope_and_write_kv(qkv[:, 1:], positions, table(8, 16), cache, positions)
    with pytest.raises(ValueError, match="slot_mapping must be torch.int64"):
        rope_and_write_kv(qkv, positions, table(8, 16), cache, positions.int())


TRITON = pytest.mark.parametrize("implementation", ["triton"], indirect=True)
# The interpreter computes with numpy, which warns where a GPU does not.
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FEW = [(1, 17), (3, 3), (2, 18)]


@TRITON
@pytest.mark.parametrize(("dtype", "qk_norm"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize(
    "heads", [*HEAD_SHAPES, (32, 8, 128)], ids=lambda heads: "x".join(map(str, heads))
)
def test_triton(
    heads: tuple[int, int, int], qk_norm: bool, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    check_rotates_and_writes(heads, 16, qk_norm, dtype, rng, FEW)


@TRITON
@QUIET
@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rotary_dim", "dim"), [(0, 40), (32, 64), (64, 64)])
def test_triton_rows_of_an_8_bit_cache(
    rotary_dim: int, dim: int, kv_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    check_8_bit_rows(rotary_dim, dim, torch.float16, kv_dtype, rng)


@TRITON
@pytest.mark.parametrize("rotary_dim", [0, 8])
def test_triton_rotates_a_part(rotary_dim: int, rng: np.random.Generator) -> None:
    """With norms, which see the whole head, and a cache of another type."""
    batch = ragged_batch(FEW, 16, rng)
    cache = random_cache(batch.num_blocks, 1, 16, 32)
    qkv, norm = torch.randn(batch.num_rows, 3 * 32).half(), torch.randn(32)
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)
    cos_sin = table(64, rotary_dim)
    q_out = poisoned(batch.num_rows, 1, 32)
    q = rope_and_write_kv(
        qkv, positions, cos_sin, cache, slots, q_out, q_norm=norm, k_norm=2 * norm, eps=1e-6
    )
    query, key = qkv.view(-1, 3, 32)[:, :1], qkv.view(-1, 3, 32)[:, 1:2]
    tolerance = TOLERANCES["rope", torch.float32]
    assert_close(q, naive(normed(query, norm, 1e-6), positions, cos_sin), tolerance)
    used = slots >= 0
    written = cache[slots[used] // 16, 0, :, slots[used] % 16]
    expected = naive(normed(key, 2 * norm, 1e-6), positions, cos_sin)
    assert_close(written, expected[used], tolerance)


@TRITON
def test_triton_reads_and_writes_nothing_outside() -> None:
    qkv, cache = torch.randn(4, 3 * 32), torch.zeros(1, 2, 1, 16, 32)
    positions, slots = torch.tensor([7, -5, 8, 2**40]), torch.tensor([3, 16, -7, 2**40])
    cos_sin = table(8, 32)
    q = rope_and_write_kv(qkv, positions, cos_sin, cache, slots)
    nearest = torch.tensor([7, 0, 7, 7])
    expected = naive(qkv.view(4, 3, 32)[:, :1], nearest, cos_sin)
    assert_close(q, expected, TOLERANCES["rope", torch.float32])
    assert torch.equal(cache[0, 1, 0, 3], qkv[0, 64:])
    cache[:, :, :, 3] = 0
    assert not cache.any()


@TRITON
@QUIET
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8])
def test_triton_offsets_beyond_32_bits(kv_dtype: torch.dtype) -> None:
    """A cache of 2^31 elements and a few pages, of which the last are touched."""
    dim, page = 256, 16
    blocks = 2**31 // (2 * page * dim) + 4
    cache = torch.empty((blocks, 2, 1, page, row_size(dim, kv_dtype)), dtype=kv_dtype)
    qkv, slots = torch.randn(2, 3 * dim).half(), torch.tensor([blocks * page - 1, 5])
    rope_and_write_kv(qkv, torch.arange(2), table(8, 0), cache, slots)
    written = from_pages(cache[[blocks - 1, 0]])[[0, 1], 1, 0, [15, 5]]
    step = qkv.view(2, 3, dim)[:, 2].abs().amax().float() / 127
    assert (written - qkv[:, 2 * dim :].float()).abs().max() <= step / 2


@TRITON
@QUIET
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_triton_a_row_depends_on_itself_only(
    kv_dtype: torch.dtype, rng: np.random.Generator
) -> None:
    batch = ragged_batch([(9, 20)], 16, rng, pad_to=1)
    qkv, norm, cos_sin = torch.randn(batch.num_rows, 5 * 16), torch.randn(16), table(64, 16)
    positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(batch.slot_mapping)

    def run(*borders: int) -> tuple[Tensor, Tensor]:
        cache = torch.zeros(batch.num_blocks, 2, 1, 16, row_size(16, kv_dtype), dtype=kv_dtype)
        parts = []
        for first, last in zip(borders, borders[1:], strict=False):
            rows = slice(first, last)
            step = qkv[rows], positions[rows], cos_sin, cache, slots[rows]
            parts.append(rope_and_write_kv(*step, q_norm=norm, k_norm=norm, eps=1e-6))
        return torch.cat(parts), cache

    for whole, parts in zip(run(0, 9), run(0, 1, 6, 9), strict=True):
        assert torch.equal(whole, parts)
