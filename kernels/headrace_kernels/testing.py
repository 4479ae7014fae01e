"""Input generators, tolerances and comparators for the tests and benchmarks of every op.

Ships with the package, so that a kernel written elsewhere is held to the same cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.kv_format import from_pages, to_pages
from headrace_kernels.packed_format import GROUP, PackedFormat
from headrace_kernels.packed_weight import pack_into

RAGGED_LENGTHS: Mapping[str, Sequence[tuple[int, int]]] = {
    "no request": [],
    "first token": [(1, 1)],
    "decode": [(1, 1), (1, 63), (1, 64), (1, 65), (1, 200), (1, 16), (1, 17)],
    "one prompt": [(70, 70)],
    "page borders": [(15, 15), (16, 16), (17, 17), (31, 48)],
    "tile borders": [(63, 63), (64, 64), (65, 65), (2, 130), (64, 128)],
    "requests of no rows": [(0, 0), (1, 20), (0, 33), (0, 0), (5, 70), (0, 1)],
    "mixed": [(1, 90), (33, 33), (1, 1), (7, 140), (1, 300), (2, 2)],
}
"""(query tokens, cached tokens with them) of each request."""

HEAD_SHAPES: Sequence[tuple[int, int, int]] = ((9, 3, 64), (4, 4, 16), (8, 1, 32), (6, 2, 80))
"""(H, K, D): grouped, multi-head and multi-query attention; D that is no power of two."""

LOGIT_STYLES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x * 0.02,
    "spread": lambda x: x,
    "peaked": lambda x: x * 8,
    "equal": torch.zeros_like,
    "ties": lambda x: x.round(),
    "signed zeros": lambda x: x.sign() * 0.0,
    "banned": lambda x: torch.where(x > 0.5, x, -math.inf),
    "huge": lambda x: x * 1e37,
    "tiny": lambda x: x * 1e-44,
    "far apart": lambda x: torch.where(x > 1, x, x - 1000),
}
"""From standard normal numbers to the logits of a vocabulary."""


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """The host arrays of one step, with blocks in random order and rows padded to a multiple."""

    query_lens: npt.NDArray[np.int64]
    seq_lens: npt.NDArray[np.int64]
    block_table: npt.NDArray[np.int64]
    slot_mapping: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    num_blocks: int
    page_size: int

    @property
    def num_rows(self) -> int:
        """T, padding included."""
        return len(self.slot_mapping)

    def metadata(self, device: str = "cpu") -> AttentionMetadata:
        return AttentionMetadata.build(
            self.query_lens, self.seq_lens, self.block_table, self.slot_mapping, device
        )

    def slots_of(self, request: int) -> npt.NDArray[np.int64]:
        """The slot of each cached token of a request."""
        token = np.arange(self.seq_lens[request])
        blocks = self.block_table[request, token // self.page_size]
        slots: npt.NDArray[np.int64] = blocks * self.page_size + token % self.page_size
        return slots


def ragged_batch(
    lengths: Sequence[tuple[int, int]],
    page_size: int,
    rng: np.random.Generator,
    *,
    pad_to: int = 8,
    spare_blocks: int = 3,
) -> RaggedBatch:
    """Lay out requests of (query tokens, cached tokens with them) in a cache of shuffled blocks.

    Entries of the block table that no token uses are -1.
    """
    query_lens = np.array([query for query, _ in lengths], dtype=np.int64)
    seq_lens = np.array([seq for _, seq in lengths], dtype=np.int64)
    blocks_each = -(-seq_lens // page_size)
    num_blocks = int(blocks_each.sum()) + spare_blocks
    free = rng.permutation(num_blocks)
    table = np.full((len(lengths), max(blocks_each, default=0) + 1), -1, dtype=np.int64)
    for request, count in enumerate(blocks_each):
        table[request, :count], free = free[:count], free[count:]
    rows = -(-int(query_lens.sum()) // pad_to) * pad_to or pad_to
    slots = np.full(rows, -1, dtype=np.int64)
    positions = np.zeros(rows, dtype=np.int64)
    begin = 0
    for request, (query, seq) in enumerate(lengths):
        own = np.arange(seq - query, seq)
        positions[begin : begin + query] = own
        slots[begin : begin + query] = table[request, own // page_size] * page_size
        slots[begin : begin + query] += own % page_size
        begin += query
    return RaggedBatch(query_lens, seq_lens, table, slots, positions, num_blocks, page_size)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """An output full of NaN: what an op forgets to write is found."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest error allowed: absolute + relative * |expected|, and why it is not smaller."""

    absolute: float
    relative: float
    reason: str


TOLERANCES: Mapping[tuple[str, torch.dtype], Tolerance] = {
    ("norm", torch.float32): Tolerance(1e-6, 2e-6, "a mean and a few fp32 roundings"),
    ("norm", torch.bfloat16): Tolerance(1e-6, 2**-8, "the output is rounded to 8 bits"),
    ("activation", torch.float32): Tolerance(1e-6, 2e-6, "exp and a few fp32 roundings"),
    ("activation", torch.bfloat16): Tolerance(1e-6, 2**-8, "the output is rounded to 8 bits"),
    ("rope", torch.float32): Tolerance(2e-6, 2e-6, "two products and a sum, which may cancel"),
    ("rope", torch.bfloat16): Tolerance(1e-5, 2**-8, "the output is rounded to 8 bits"),
    ("linear", torch.float32): Tolerance(2e-4, 1e-5, "a sum of K fp32 products of unit size"),
    ("linear", torch.bfloat16): Tolerance(2e-4, 2**-8, "the output is rounded to 8 bits"),
    ("quantized_linear", torch.float32): Tolerance(
        1e-5, 1e-5, "exact integer products, of which a few dozen are scaled and summed in fp32"
    ),
    ("quantized_linear", torch.bfloat16): Tolerance(1e-5, 2**-8, "the output is rounded to 8 bits"),
    ("attention", torch.float32): Tolerance(2e-6, 2e-5, "fp32 scores under exp, and two sums"),
    ("attention", torch.bfloat16): Tolerance(1e-5, 2**-7, "the output is rounded to 8 bits"),
}
"""By stem and dtype of inputs and output; inputs are drawn from the standard normal."""


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Raise AssertionError, with the worst element, unless `actual` is within the tolerance.

    NaN and infinity must stand where `expected` has them.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {expected.shape}"
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    for name, mask in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        differing = (mask(got) != mask(want)).nonzero()
        if len(differing):
            raise AssertionError(
                f"{name} in one but not the other at {len(differing)} of {got.numel()} elements, "
                f"first at {tuple(differing[0].tolist())}"
            )
    finite = torch.isfinite(want)
    error = torch.where(finite, got - want, 0.0).abs()
    allowed = tolerance.absolute + tolerance.relative * torch.where(finite, want, 0.0).abs()
    excess = error - allowed
    if got.numel() and excess.max() > 0:
        worst = np.unravel_index(int(excess.argmax()), got.shape)
        raise AssertionError(
            f"{int((excess > 0).sum())} of {got.numel()} elements are off; worst at "
            f"{tuple(int(i) for i in worst)}: {got[worst].item()} instead of "
            f"{want[worst].item()} (allowed {tolerance.absolute} + {tolerance.relative} relative: "
            f"{tolerance.reason})"
        )


def naive_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of one request in float64: the oracle of the attention kernels.

    q: [Q, H, D], the last Q of L tokens; keys, values: [L, K, D] -> [Q, H, D] float64.
    """
    query_len, heads, _ = q.shape
    length, kv_heads, _ = keys.shape
    k = keys.double().repeat_interleave(heads // kv_heads, dim=1)
    v = values.double().repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,lhd->hql", q.double(), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(length - query_len, length)[:, None]
    token = torch.arange(length)[None, :]
    hidden = token > position
    if sliding_window is not None:
        hidden = hidden | (token <= position - sliding_window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hql,lhd->qhd", weights, v)


def expected_attention(
    q: Tensor,
    cache: Tensor,
    batch: RaggedBatch,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """What attention has to make of a batch, in float64, request by request; 0 for padding.

    q: [T, H, D]; cache: [B, 2, K, P, row_size(D)]. The scale is D^-0.5.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    by_slot = from_pages(cache).permute(1, 0, 3, 2, 4).reshape(2, -1, cache.shape[2], q.shape[-1])
    begin = 0
    for request, query_len in enumerate(batch.query_lens.tolist()):
        keys, values = by_slot[:, batch.slots_of(request)]
        rows = slice(begin, begin + query_len)
        scale = q.shape[-1] ** -0.5
        out[rows] = naive_attention(q[rows], keys, values, scale, window, soft_cap)
        begin += query_len
    return out


def random_packed(fmt: PackedFormat, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Random packed weights of standard deviation 1, and the same as [Out, In] float64."""
    groups = in_features // GROUP
    levels = 1 << fmt.bits
    u = torch.randint(0, levels, (out_features, groups, GROUP), dtype=torch.uint8)
    integers = u
    if fmt.bits == 4:
        integers = u[..., : GROUP // 2] | (u[..., GROUP // 2 :] << 4)
    dtype = torch.float16 if fmt.scale_bits == 16 else torch.float32
    scales = (out_features, groups * fmt.parts)
    scale = ((torch.rand(scales) + 0.5) * 12**0.5 / levels).to(dtype)
    minimum = -(scale.float() * levels * torch.rand(scales)).to(dtype)
    packed = torch.empty(fmt.shape(out_features, in_features), dtype=torch.uint8)
    pack_into(packed, fmt, integers, scale, minimum if fmt.has_minimum else None)
    values = u.double().view(*scales, fmt.inputs_per_scale)
    dense = (values - fmt.zero) * scale.double().unsqueeze(-1)
    if fmt.has_minimum:
        dense += minimum.double().unsqueeze(-1)
    return packed, dense.flatten(1)


def random_cache(
    num_blocks: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A [B, 2, K, P, D] view of a cache of three layers: block strides are not those of a copy.

    Of 8 bits it is [B, 2, K, P, D + 4].
    """
    whole = to_pages(torch.randn((num_blocks, 3, 2, kv_heads, page_size, head_dim)), dtype)
    return whole[:, 1]


def random_logits(style: str, rows: int, vocab_size: int, seed: int) -> Tensor:
    """Logits [rows, vocab_size] of LOGIT_STYLES; each row is a distribution."""
    generator = torch.Generator().manual_seed(seed)
    logits = LOGIT_STYLES[style](torch.randn(rows, vocab_size, generator=generator))
    logits[:, -1] = torch.where(logits[:, -1].isfinite(), logits[:, -1], 0.0)
    return logits


def sampling_columns(rows: int, **values: Any) -> dict[str, Tensor]:
    """The columns of `sample_tokens`, without filters but for those given; a number is every row's.

    The noise of each row is another position of one seed.
    """
    defaults: dict[str, tuple[Any, torch.dtype]] = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seeds": (99, torch.int64),
        "positions": (torch.arange(rows), torch.int64),
    }
    return {
        name: torch.as_tensor(values.get(name, default), dtype=dtype).expand(rows).contiguous()
        for name, (default, dtype) in defaults.items()
    }


def random_sampling_columns(rows: int, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """Rows of random temperatures and filters: their borders, and what is between them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(choices: list[float]) -> Tensor:
        return torch.tensor(choices)[torch.randint(len(choices), (rows,), generator=generator)]

    top_k = drawn([0, 0, 1, 2, 20, 50, 900, vocab_size - 1, vocab_size, vocab_size + 1])
    return sampling_columns(
        rows,
        temperature=drawn([0, 1e-6, 0.01, 0.3, 1, 1, 2.5, 100]),
        top_k=top_k.clamp(min=0),
        top_p=drawn([1e-30, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999999, 1 - 2**-24, 1, 1, 1]),
        min_p=drawn([0, 0, 0, 1e-6, 0.05, 0.3, 1]),
        seeds=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        positions=torch.randint(0, 2**40, (rows,), generator=generator),
    )
