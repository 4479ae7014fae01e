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
from headrace.quantization.method import Format, StoredTensor
from headrace_kernels.packed_format import COLUMNS, GROUP, PackedFormat
from headrace_kernels.packed_weight import pack_into

PIECE_BYTES = 8 << 20
"""Packed at a time: bounds the copies that packing makes."""

Fields = tuple[Tensor, Tensor, Tensor | None]
"""Integers, scales and minima of rows, as pack_into takes them: fp32 where fp16 would round."""


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
    """The QuantMethod of GGUF files; tensors of other files stay as they are.

    With `exact_scales` no scale is rounded to fp16: those that do not fit take fp32.
    """

    def __init__(self, *, exact_scales: bool = False) -> None:
        self._exact_scales = exact_scales

    def format_of(self, tensor: StoredTensor) -> PackedFormat | None:
        if not isinstance(tensor, BlockTensor):
            return None
        return packed_format(tensor.quantization, tensor.shape, exact_scales=self._exact_scales)

    def read(self, tensor: StoredTensor, fmt: Format, into: tuple[Tensor, ...]) -> None:
        assert isinstance(tensor, BlockTensor) and isinstance(fmt, PackedFormat)
        (packed,) = into
        dtype = torch.float32 if fmt.scale_bits == 32 else torch.float16
        decode = _DECODERS[tensor.quantization]
        for first, blocks in _pieces(tensor):
            integers, scale, minimum = decode(blocks.to(packed.device))
            scale = scale.to(dtype)
            minimum = None if minimum is None else minimum.to(dtype)
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
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
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


def _nibbles(values: Tensor) -> Tensor:
    """[rows, blocks, 256] of 4 bits -> the bytes of groups of 32, as pack_into takes them."""
    groups = values.reshape(len(values), -1, GROUP)
    return groups[..., : GROUP // 2] | (groups[..., GROUP // 2 :] << 4)


def _split(values: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return values.reshape(*values.shape[:-1], *sizes)


def _fields(packed: Tensor, width: int) -> Tensor:
    """[..., n] bytes -> [..., 8 // width, n]: field i is bits [i * width, (i + 1) * width)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts) & ((1 << width) - 1)


def _scales(integers: Tensor, blocks: Tensor, at: int) -> Tensor:
    """Integers [rows, blocks, n] times the float16 at byte `at`: float32 [rows, n * blocks]."""
    scales = integers.float() * _half(blocks, at).float().unsqueeze(-1)
    return scales.flatten(1)


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits at byte 4, times d and -dmin at bytes 0 and 2."""
    first, second, mixed = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scale = torch.cat((first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    minimum = torch.cat((second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)), dim=-1)
    return _scales(scale, blocks, 0), -_scales(minimum, blocks, 2)


def _q2_k(blocks: Tensor) -> Fields:
    """16 scales and minima of 4 bits, 256 values of 2 bits, then d and dmin."""
    scales, packed = blocks[..., :16], blocks[..., 16:80]
    values = _fields(_split(packed, 2, 32), 2).flatten(2)
    minimum = -_scales(scales >> 4, blocks, 82)
    return _nibbles(values), _scales(scales & 0x0F, blocks, 80), minimum


def _q3_k(blocks: Tensor) -> Fields:
    """A mask of high bits, 256 low pairs of bits, 16 scales of 6 bits from -32, d."""
    mask, packed, scales = blocks[..., :32], blocks[..., 32:96], blocks[..., 96:108]
    low = torch.cat((scales[..., :8] & 0x0F, scales[..., :8] >> 4), dim=-1)
    scale = low | (_fields(scales[..., 8:], 2).flatten(-2) << 4)
    values = _fields(_split(packed, 2, 32), 2).flatten(2)
    values |= _fields(mask, 1).flatten(2) << 2
    # Of 4 bits the zero is 8, of 3 it is 4.
    return _nibbles(values + 4), _scales(scale.to(torch.int8) - 32, blocks, 108), None


def _q4_k(blocks: Tensor) -> Fields:
    """Of 256 values: d, dmin, 8 scales and 8 minima of 6 bits, then pairs of groups of 4 bits."""
    values = _fields(_split(blocks[..., 16:], 4, GROUP), 4).flatten(2)
    return _nibbles(values), *_six_bit_scales(blocks)


def _q5_k(blocks: Tensor) -> Fields:
    """As Q4_K, with 256 high bits before the values."""
    low = _fields(_split(blocks[..., 48:], 4, GROUP), 4).flatten(2)
    values = low | (_fields(blocks[..., 16:48], 1).flatten(2) << 4)
    return values, *_six_bit_scales(blocks)


def _q6_k(blocks: Tensor) -> Fields:
    """256 low nibbles, 256 high pairs of bits, 16 signed scales of 8 bits, d."""
    low = _fields(_split(blocks[..., :128], 2, 64), 4).flatten(2)
    high = _fields(_split(blocks[..., 128:192], 2, 32), 2).flatten(2)
    scale = blocks[..., 192:208].view(torch.int8)
    # Of 8 bits the zero is 128, of 6 it is 32.
    return (low | (high << 4)) + 96, _scales(scale, blocks, 208), None


_DECODERS: dict[str, Callable[[Tensor], Fields]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
_BLOCK_BYTES = {
    "Q4_0": 18,
    "Q4_1": 20,
    "Q5_0": 22,
    "Q5_1": 24,
    "Q8_0": 34,
    "Q2_K": 84,
    "Q3_K": 110,
    "Q4_K": 144,
    "Q5_K": 176,
    "Q6_K": 210,
}
