"""Copies of KV blocks: the op on the reference, and the CUDA kernel run on the host."""

from __future__ import annotations

import ctypes

import pytest
import torch
from tests.kernels.cuda_host import library, pointer
from torch import Tensor

from headrace_kernels.ops.kv_copy import copy_blocks

PAIRS = torch.tensor([[3, 1], [-1, 2], [0, 4], [2, -1], [5, 0]])


def pools(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(6, *shape), torch.randn(5, *shape)


def expected_of(src: Tensor, dst: Tensor) -> Tensor:
    result = dst.clone()
    for source, target in PAIRS.tolist():
        if source >= 0 and target >= 0:
            result[target] = src[source]
    return result


def test_blocks_are_copied_and_padding_is_skipped() -> None:
    src, dst = pools(2, 3, 4)
    expected = expected_of(src, dst)
    copy_blocks(src, dst, PAIRS)
    assert torch.equal(dst, expected)
    copy_blocks(src, dst, PAIRS[:0])
    assert torch.equal(dst, expected)


def test_a_block_is_copied_within_its_pool() -> None:
    pool, _ = pools(7)
    expected = pool.clone()
    expected[4] = pool[1]
    copy_blocks(pool, pool, torch.tensor([[1, 4]]))
    assert torch.equal(pool, expected)


@pytest.mark.parametrize(
    ("src", "dst", "pairs", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), PAIRS, "as those of src"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), PAIRS, "as those of src"),
        (torch.zeros(2, 3), torch.zeros(2, 3), PAIRS[:, :1], "pairs must be int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3), PAIRS.int(), "pairs must be int64"),
        (torch.zeros(2, 3), torch.zeros(9, 3), PAIRS, "below the sizes of the pools"),
        (torch.zeros(9, 3), torch.zeros(2, 3), PAIRS, "below the sizes of the pools"),
    ],
)
def test_what_cannot_be_copied_is_refused(
    src: Tensor, dst: Tensor, pairs: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        copy_blocks(src, dst, pairs)


@pytest.mark.parametrize("size", [4, 8192 + 12, 3 * 8192])
def test_the_cuda_kernel_copies_the_same(size: int) -> None:
    """Floats of a block: a vector, chunks and a rest, chunks; blocks are strided."""
    src, dst = pools(size + 8)
    src, dst = src[:, 4:-4], dst[:, 4:-4]
    expected = expected_of(src, dst)
    behind = torch.tensor([[6, 1], [1, 5]])  # what is beyond a pool is skipped too
    pairs = torch.cat((PAIRS, behind))
    row = (size + 8) // 4
    layout = torch.tensor([row, row, 6, 5, size // 4])
    library().copy_blocks(
        pointer(src), pointer(dst), pointer(pairs), ctypes.c_int64(len(pairs)), pointer(layout), 0
    )
    assert torch.equal(dst, expected)
