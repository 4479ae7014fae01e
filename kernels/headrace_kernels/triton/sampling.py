"""Sampling and log-probabilities in Triton, without sorting and without waiting for the device.

Three launches, of which the first two cut a row into chunks, so that a few rows occupy the GPU too:

1. `scan_kernel`: the largest logit of each chunk, and of 64 groups of tokens in it.
2. `draw_kernel`: the best score of each chunk, and its mass where top_p needs it. Of a row with
   top_k it makes a list of what may be among the k instead: what reaches the k-th largest group.
3. `finish_kernel`, a program a row: merges the chunks. With top_p alone the winner usually is in
   the nucleus, and the mass ranked before it tells: survivors are a prefix of the ranking, so that
   all from a loser on is cut off, and the best of the rest is drawn. In the mean that takes at most
   1 + ln(1 / top_p) draws. With top_k it cuts the list by radix selection first.

256 rows of 151,936 logits are 156 MB, 36 us at 4.3 TB/s, and are read twice; greedy rows once, and
with top_k only the chunks with one of the k. Noise takes about as long where every token is in the
running (Philox, two float32 logarithms); float64 is left to the few tokens that may have won.

Invariance: sums over tokens are of whole numbers, all else is a maximum under a total order, so
that no order of programs shows. Log-probabilities sum float32 in chunks of a fixed size, from
token 0 on, and these in one tree.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts
from headrace_kernels.triton.builds import Build
from headrace_kernels.triton.sampling_finish import finish_kernel
from headrace_kernels.triton.sampling_logprobs import list_kernel, logprobs_kernel
from headrace_kernels.triton.sampling_row import (
    CHUNK_FLOATS,
    CHUNK_INTS,
    GROUPS,
    ROW_FLOATS,
    ROW_INTS,
    best_of_row,
    count_of,
    drawn_of,
    first_score,
    floats_of,
    groups_of,
    ints_of,
    list_chunk,
    row_of,
    scores_of,
)
from headrace_kernels.triton.sampling_tile import (
    CHUNK,
    HOPELESS,
    NO_MASS,
    NO_TOKEN,
    best_scored,
    key_of,
    least_that_wins,
    mass_sum,
    scaled_of,
    words_of_run,
)

OPTIONS = {"enable_fp_fusion": False}
"""Of every launch: see sampling_tile.py."""
WARPS, FINISH_WARPS = 8, 16
DRAW_PART = tl.constexpr(1024)
"""Of a chunk, that is drawn from at once: of more the registers spill on some architecture."""
MIN_SLOTS = 64
"""Chunks of up to 262,144 tokens: models with fewer share what is compiled."""


def declines(facts: KernelFacts) -> str | None:
    """Logits are float32 whatever the model is."""
    return None


def sample_tokens(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """See ops/sampling.py. All on one device, nothing waits for it."""
    rows, vocab_size = logits.shape
    if rows == 0:
        return
    logits = _with_unit_stride(logits)
    memory = _memory(rows, vocab_size, logits.device)
    columns = [
        column.contiguous() for column in (temperature, top_k, top_p, min_p, seeds, positions)
    ]
    sizes = logits.stride(0), vocab_size
    chunks, aligned = triton.cdiv(vocab_size, CHUNK.value), _is_aligned(logits)
    slots = _slots(vocab_size)
    _scan(logits, memory, with_sum=False)
    draw_kernel[rows, chunks](
        logits, *columns, *memory, *sizes, aligned, slots, slots * GROUPS.value,
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    finish_kernel[rows,](
        logits, *columns, *memory, out, *sizes, slots, num_warps=FINISH_WARPS, **OPTIONS
    )


def token_logprobs(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    """See ops/sampling.py."""
    rows, vocab_size = logits.shape
    if rows == 0:
        return
    logits = _with_unit_stride(logits)
    floats, ints, _ = memory = _memory(rows, vocab_size, logits.device)
    k = top_ids.shape[1]
    sizes = logits.stride(0), vocab_size, k
    slots = _slots(vocab_size)
    _scan(logits, memory, with_sum=True)
    if k > 0:
        list_kernel[rows, triton.cdiv(vocab_size, CHUNK.value)](
            logits, floats, ints, *sizes, _is_aligned(logits), slots, slots * GROUPS.value,
            num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    logprobs_kernel[rows,](
        logits, token_ids.contiguous(), floats, ints, logprobs, top_ids, top_logprobs, *sizes,
        slots, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip


def builds(arch: str) -> Iterator[Build]:
    """For aligned logits of vocabularies up to 262,144, such as SmolLM2's, Llama's and Qwen3's."""
    logits, sizes = {"logits": "*fp32"}, {"stride": "i32", "vocab": "i32"}
    state, k = {"floats": "*fp32", "ints": "*i32"}, {"k": "i32"}
    sampled = logits | state | {
        "temperatures": "*fp32", "top_ks": "*i32", "top_ps": "*fp32", "min_ps": "*fp32",
        "seeds": "*i64", "positions": "*i64", "sums": "*i64",
    }  # fmt: skip
    found = {"token_ids": "*i64", "logprobs": "*fp32", "top_ids": "*i64", "top_logprobs": "*fp32"}
    slots = {"SLOTS": MIN_SLOTS}
    wide = slots | {"ALIGNED": True, "GROUP_SLOTS": MIN_SLOTS * GROUPS.value}
    scan = logits | state | sizes
    for name, kernel, types, constants, warps in (
        ("scan", scan_kernel, scan, {"ALIGNED": True, "WITH_SUM": False}, WARPS),
        ("scan and sum", scan_kernel, scan, {"ALIGNED": True, "WITH_SUM": True}, WARPS),
        ("draw", draw_kernel, sampled | sizes, wide, WARPS),
        ("finish", finish_kernel, sampled | sizes | {"out": "*i64"}, slots, FINISH_WARPS),
        ("list", list_kernel, scan | k, wide, WARPS),
        ("logprobs", logprobs_kernel, scan | k | found, slots, WARPS),
    ):
        yield Build(
            name=name, kernel=kernel, types=types, constants=constants, num_warps=warps,
            options=OPTIONS,
        )  # fmt: skip


def _with_unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _is_aligned(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes and ends at one."""
    return (logits.data_ptr() | 4 * logits.stride(0) | 4 * logits.shape[1]) % 16 == 0


def _slots(vocab_size: int) -> int:
    """The chunks of a row, rounded up to a power of two."""
    return max(MIN_SLOTS, triton.next_power_of_2(triton.cdiv(vocab_size, CHUNK.value)))


def _memory(rows: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a call keeps of its rows: `floats` and `ints` of sampling_row.py, and chunks' masses."""
    chunks = triton.cdiv(vocab_size, CHUNK.value)
    floats = chunks * CHUNK_FLOATS.value + ROW_FLOATS.value
    ints = chunks * CHUNK_INTS.value + ROW_INTS.value
    return (
        torch.empty(rows * floats, dtype=torch.float32, device=device),
        torch.empty(rows * ints, dtype=torch.int32, device=device),
        torch.empty(rows * chunks, dtype=torch.int64, device=device),
    )


def _scan(logits: Tensor, memory: tuple[Tensor, Tensor, Tensor], *, with_sum: bool) -> None:
    rows, vocab_size = logits.shape
    scan_kernel[rows, triton.cdiv(vocab_size, CHUNK.value)](
        logits, *memory[:2], logits.stride(0), vocab_size, _is_aligned(logits), with_sum,
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "vocab"])
def scan_kernel(logits, floats, ints, stride, vocab, ALIGNED: tl.constexpr, WITH_SUM: tl.constexpr):
    """Grid (rows, chunks). A chunk with NaN has a largest logit of infinity."""
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    logits, vocab = row_of(logits, row.to(tl.int64), stride, vocab, ALIGNED)
    floats, ints = floats_of(floats, row, chunks), ints_of(ints, row, chunks)
    lane = tl.arange(0, GROUPS)
    token = chunk * CHUNK + tl.arange(0, CHUNK // GROUPS)[:, None] * GROUPS + lane[None, :]
    x = tl.load(logits + token, mask=token < vocab, other=float("-inf"))
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x, 0)
    best = tl.max(largest, 0)
    tl.store(groups_of(floats, chunks) + chunk * GROUPS + lane, largest)
    tl.store(floats + chunk, best)
    tl.store(ints + chunk, tl.min(tl.min(tl.where(x == best, token, NO_TOKEN), 0), 0))
    if WITH_SUM:
        unit = tl.where(tl.abs(best) < float("inf"), best, 0.0)
        tl.store(scores_of(floats, chunks) + chunk, tl.sum(tl.sum(tl.exp(x - unit), 0), 0))
    if chunk == 0:
        tl.store(count_of(ints, chunks), 0)


@triton.jit(do_not_specialize=["stride", "vocab"])
def draw_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, floats, ints, sums,
    stride, vocab, ALIGNED: tl.constexpr, SLOTS: tl.constexpr, GROUP_SLOTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, chunks)."""
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        logits, vocab = row_of(logits, row.to(tl.int64), stride, vocab, ALIGNED)
        floats, ints = floats_of(floats, row, chunks), ints_of(ints, row, chunks)
        best, best_token, usable = best_of_row(floats, ints, chunks, SLOTS)
        k = tl.load(top_ks + row)
        if usable:
            if (k > 0) & (k < vocab):
                # What cannot win weighs nothing either: the list may do without.
                hopeless = key_of(tl.full([], HOPELESS, tl.float32))
                list_chunk(
                    logits, floats, ints, chunk, chunks, vocab, best, temperature, k, hopeless,
                    GROUP_SLOTS,
                )  # fmt: skip
            else:
                seed, position, first = first_score(seeds, positions, row, best_token)
                _draw_chunk(
                    logits, floats, ints, sums + row.to(tl.int64) * chunks, chunk, chunks, vocab,
                    best, best_token, temperature, tl.load(top_ps + row) < 1,
                    least_that_wins(first, tl.load(min_ps + row)), seed, position, first,
                )  # fmt: skip


@triton.jit
def _draw_chunk(
    logits, floats, ints, sums, chunk, chunks, vocab,
    best, best_token, temperature, weighed, least, seed, position, first,
):  # fmt: skip
    """Writes the chunk's best score, the first token's if none beats it, and its mass."""
    score, token = first, best_token
    mass = tl.full([], 0, tl.int64)
    nearest = scaled_of(tl.load(floats + chunk), best, temperature)
    if (nearest >= least) | (weighed & (nearest >= NO_MASS)):
        for part in range(CHUNK // DRAW_PART):
            start = chunk * CHUNK + part * DRAW_PART
            tokens = start + tl.arange(0, DRAW_PART)
            x = tl.load(logits + tokens, mask=tokens < vocab, other=float("-inf"))
            scaled = scaled_of(x, best, temperature)
            if weighed:
                mass += mass_sum(scaled)
            if nearest >= least:
                words = words_of_run(seed, position, start, DRAW_PART)
                score, token = best_scored(scaled, tokens, scaled >= least, words, score, token)
    tl.store(scores_of(floats, chunks) + chunk, score)
    tl.store(drawn_of(ints, chunks) + chunk, token)
    tl.store(sums + chunk, mass)
