"""What the matrix products share: parts of K, tiles, the order of tiles, and the sum of parts.

Each computes tiles [BLOCK_O outputs, BLOCK_T tokens] of the transposed product, so that weights are
the first operand of the tensor cores: 64 of their rows fill an instruction however few tokens there
are, and one kind of instruction serves every T. K is cut into `parts` of `part_inputs`, which
depend on the matrix alone. Within a part products are added in ascending order, 32 bytes of K an
instruction, whatever the tile; parts are added in ascending order, in registers where one program
has them all, else by the program of a tile that is done last. So a row's bits depend on that row
only, for every T: as far as a tensor core treats every element of a tile alike, which can be seen
on a GPU only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace_kernels.dispatch import KernelFacts, device_arch

SPLIT_PROGRAMS = 288
"""Most programs of a launch that splits K: about two on each of 132 multiprocessors."""
MAX_PARTS = 8
MIN_PART_INPUTS = 256
PART_MULTIPLE = 256
GROUP_TILES = 8
"""Token tiles that read a block of weights one after another, while it is in the L2 cache."""
SCRATCH_SUMS = SPLIT_PROGRAMS * 128 * 128
SCRATCH_TILES = 1024


EXPECTS = {
    "sm_80": ("cp.async.cg", "mma.sync.aligned.m16n8k"),
    "sm_90": ("cp.async.bulk.tensor", "wgmma.mma_async"),
    "sm_100": ("cp.async.bulk.tensor", "tcgen05.mma"),
}
"""What the PTX of a product holds: asynchronous loads, and the tensor cores' instruction."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """A configuration of a kernel. None of it changes the bits of a result."""

    block_t: int
    block_o: int
    block_k: int
    num_warps: int
    num_stages: int


def parts_of(outputs: int, inputs: int) -> tuple[int, int]:
    """(parts of K, inputs of each but the last): programs for every multiprocessor if T is 1.

    The parts of a matrix of 4096 x 4096 are 4: 256 programs of 64 outputs, each with about 50 KB on
    the way, which is more than a bandwidth of 4.3 TB/s has in flight.
    """
    blocks = -(-outputs // 64)
    parts = 1
    while parts < MAX_PARTS and 2 * parts * blocks <= SPLIT_PROGRAMS:
        parts *= 2
    parts = max(1, min(parts, inputs // MIN_PART_INPUTS))
    part_inputs = -(-inputs // parts)
    part_inputs = max(1, -(-part_inputs // PART_MULTIPLE)) * PART_MULTIPLE
    return max(1, -(-inputs // part_inputs)), part_inputs


def tiles_of(tokens: int, outputs: int, tiling: Tiling) -> int:
    return -(-tokens // tiling.block_t) * -(-outputs // tiling.block_o)


def splits(
    tokens: int, outputs: int, parts: int, tiling: Tiling, programs: int | None = None
) -> bool:
    """Whether each part is a program of its own: if they are no more than `programs`."""
    tiles = tiles_of(tokens, outputs, tiling)
    sums = parts * tiles * tiling.block_t * tiling.block_o
    fits = sums <= SCRATCH_SUMS and tiles <= SCRATCH_TILES
    return parts > 1 and fits and parts * tiles <= (programs or SPLIT_PROGRAMS)


@functools.lru_cache(maxsize=16)
def scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums of parts, fp32, and how many have arrived of each tile: zeros between launches.

    Of one size for every product, made at the first, so that a captured graph keeps its addresses.
    The products of a device run one after another, on one stream or on streams that wait.
    """
    partials = torch.empty(SCRATCH_SUMS, device=device)
    return partials, torch.zeros(SCRATCH_TILES, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What of an architecture decides about configurations."""

    capability: int

    @property
    def tma(self) -> bool:
        return self.capability >= 90

    @property
    def e4m3(self) -> bool:
        return self.capability >= 89

    @property
    def large_shared(self) -> bool:
        """227 KB of shared memory, not 99 or 163."""
        return self.capability // 10 in (9, 10)


def hardware_of(arch: str) -> Hardware:
    return Hardware(int(arch.removeprefix("sm_")))


@functools.lru_cache(maxsize=16)
def hardware(device: torch.device) -> Hardware:
    """Of this device; the interpreter, on a CPU, is taken for sm_90."""
    return hardware_of("sm_90" if device.type == "cpu" else device_arch(device))


def fetched_by_tma(*matrices: Tensor) -> bool:
    """Whether there are descriptors of these: their rows begin at multiples of 16 bytes."""
    return all(
        m.numel() > 0
        and m.stride(0) * m.element_size() % 16 == 0
        and m.data_ptr() % 16 == 0
        and hardware(m.device).tma
        for m in matrices
    )


def lacks_tensor_cores(facts: KernelFacts) -> str | None:
    """What all of these products decline: GPUs that do not multiply bf16."""
    if facts.device == "cpu":
        return None
    if facts.arch.startswith("sm_") and int(facts.arch.removeprefix("sm_")) >= 80:
        return None
    return f"needs sm_80 or later, not {facts.arch}"


def alignment(*multiples: int) -> int:
    """The largest power of two up to 16 that divides all of them."""
    return next(power for power in (16, 8, 4, 2, 1) if not any(m % power for m in multiples))


@triton.jit
def tile_of(index, T, Out, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr):
    """index -> (tile of tokens, tile of outputs): GROUP tiles of tokens for each of outputs."""
    token_tiles = tl.cdiv(T, BLOCK_T)
    output_tiles = tl.cdiv(Out, BLOCK_O)
    first = index // (GROUP * output_tiles) * GROUP
    height = tl.minimum(token_tiles - first, GROUP)
    within = index % (GROUP * output_tiles)
    return first + within % height, within // height


@triton.jit
def load_tile(
    source, first_row, k, rows_end, In, stride,
    TMA: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[ROWS, K] of a matrix. Columns that do not exist are zeros; rows, whatever is no fault."""
    if TMA:
        tile = source.load([first_row, k])
    else:
        rows = tl.minimum(first_row + tl.arange(0, ROWS), rows_end - 1) - first_row
        columns = k + tl.arange(0, K)
        start = source + first_row.to(tl.int64) * stride
        pointers = start + rows[:, None].to(tl.int64) * stride + columns[None, :]
        tile = tl.load(pointers, mask=(columns < In)[None, :], other=0.0)
    return tile


@triton.jit
def sum_of_parts(
    acc, partials, arrived, tile, part, parts, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr
):
    """Leave this part's sums; the last to arrive gets (all parts, added in ascending order, True).

    The barrier puts the stores of all threads before the one that counts; that releases them, and
    acquires those of the other parts. The last program leaves the count as it was found.
    """
    SIZE: tl.constexpr = BLOCK_T * BLOCK_O
    element = tl.arange(0, BLOCK_O)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    own = partials + tile * parts * SIZE
    tl.store(own + part * SIZE + element, acc)
    tl.debug_barrier()
    is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == parts - 1
    if is_last:
        tl.store(arrived + tile, 0)
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for other in range(parts):
            acc += tl.load(own + other * SIZE + element, cache_modifier=".cg")
    return acc, is_last


@triton.jit
def store_tile(
    acc,
    bias,
    out,
    first_t,
    first_o,
    T,
    Out,
    out_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out[tokens, outputs] = acc[outputs, tokens] + bias."""
    o = first_o + tl.arange(0, BLOCK_O)
    if HAS_BIAS:
        acc += tl.load(bias + o, mask=o < Out, other=0.0).to(tl.float32)[:, None]
    t = tl.arange(0, BLOCK_T)
    rows = out + first_t.to(tl.int64) * out_stride + t[:, None].to(tl.int64) * out_stride
    mask = (first_t + t < T)[:, None] & (o < Out)[None, :]
    tl.store(rows + o[None, :], tl.trans(acc).to(out.dtype.element_ty), mask=mask)
