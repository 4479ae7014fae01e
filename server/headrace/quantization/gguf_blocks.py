"""GGUF blocks into packed weights: the integers of the file, regrouped.

Owns the bit layouts of the stored types that can be packed: ggml-common.h of
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.quantization.gguf_formats import packed_format
from headrace.quantization.method import StoredTensor
from headrace_kernels.packed_format import COLUMNS, GROUP, PackedFormat
from headrace_kernels.packed_weight import pack_into

PIECE_BYTES = 8 << 20
"""Packed at a time: bounds the copies that packing makes."""

Fields = tuple[Tensor, Tensor, Tensor | None]
"""Integers, scales and minima of rows, as pack_into takes them."""


@runtime_checkable
class BlockTensor(Protocol):
    """A tensor of a GGUF file: loading.gguf_weights.GGUFTensor."""

    name: str
    shape: tuple[int, ...]
    quantization: str
    interleaved_heads: int | None

    @property
    def raw(self) -> memoryview: ...


class GGUFBlocks:
    """The QuantMethod of GGUF files; tensors of other files stay as they are."""

    def packed_format(self, tensor: StoredTensor) -> PackedFormat | None:
        if not isinstance(tensor, BlockTensor):
            return None
        return packed_format(tensor.quantization, tensor.shape)

    def pack_into(self, tensor: StoredTensor, packed: Tensor) -> None:
        assert isinstance(tensor, BlockTensor)
        fmt = packed_format(tensor.quantization, tensor.shape)
        assert fmt is not None
        decode = _DECODERS[tensor.quantization]
        for first, blocks in _pieces(tensor):
            integers, scale, minimum = decode(blocks)
            for values in (scale, minimum):
                if values is not None and not values.isfinite().all():
                    raise CheckpointError(
                        f"Tensor {tensor.name} has a scale that is not finite. "
                        "The file is corrupt: download it again."
                    )
            last = first + len(blocks)
            target = packed[first // COLUMNS : -(-last // COLUMNS)]
            pack_into(target, fmt, integers, scale, minimum)


def _pieces(tensor: BlockTensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, stored blocks [rows, blocks, bytes]) in Hugging Face's row order."""
    raw, rows = tensor.raw, tensor.shape[0]
    row_bytes = len(raw) // rows
    step = max(1, PIECE_BYTES // row_bytes // COLUMNS) * COLUMNS
    if tensor.interleaved_heads is not None:
        step = rows  # a head's rows are needed together; these are never the largest tensors
    block_bytes = _BLOCK_BYTES[tensor.quantization]
    for first in range(0, rows, step):
        # A fresh bytearray: torch needs a writable, aligned buffer, the mapped file is neither.
        piece = bytearray(raw[first * row_bytes : (first + step) * row_bytes])
        blocks = torch.frombuffer(piece, dtype=torch.uint8).view(-1, row_bytes)
        if (heads := tensor.interleaved_heads) is not None:
            blocks = blocks.view(heads, -1, 2, row_bytes).transpose(1, 2).reshape(rows, row_bytes)
        yield first, blocks.view(len(blocks), -1, block_bytes)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block: [rows, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _five_bits(blocks: Tensor, at: int) -> Tensor:
    """32 high bits at byte `at` and 16 bytes of low halves behind them: [..., 32] of 0 to 31."""
    shifts = torch.arange(8, dtype=torch.uint8)
    high = ((blocks[..., at : at + 4, None] >> shifts) & 1).flatten(-2)
    low = blocks[..., at + 4 :]
    return torch.cat((low & 15, low >> 4), dim=-1) | (high << 4)


def _q4_0(blocks: Tensor) -> Fields:
    return blocks[..., 2:], _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> Fields:
    return blocks[..., 4:], _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Fields:
    # Of 8 bits the zero is 128, of 5 it is 16.
    return _five_bits(blocks, 2) + 112, _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Fields:
    return _five_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Fields:
    return blocks[..., 2:] ^ 0x80, _half(blocks, 0), None


def _q4_k(blocks: Tensor) -> Fields:
    """Of 256 values: d, dmin, 8 scales and 8 minima of 6 bits, then pairs of groups of 4 bits.

    Their products with d and dmin are rounded to fp16.
    """
    first, second, mixed = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scale = torch.cat((first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    minimum = torch.cat((second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)), dim=-1)
    scaled = scale.float() * _half(blocks, 0).float().unsqueeze(-1)
    lowest = minimum.float() * -_half(blocks, 2).float().unsqueeze(-1)
    both = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, GROUP)
    values = torch.cat((both & 15, both >> 4), dim=-2)  # [..., 4, 2, 32]
    halves = values[..., : GROUP // 2] | (values[..., GROUP // 2 :] << 4)
    rows = len(blocks)
    return halves.view(rows, -1, 16), scaled.half().view(rows, -1), lowest.half().view(rows, -1)


_DECODERS: dict[str, Callable[[Tensor], Fields]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
